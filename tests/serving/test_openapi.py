"""/openapi.json holds: schemathesis makes requests from it, and every response is one that it describes."""

import re

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from starlette.testclient import TestClient

from mmllm.serving import openapi
from mmllm.serving.settings import Settings
from server_process import app, serving

LIMITS = {"max_new_tokens": 4}
CONFIG = schemathesis.Config.from_dict({"generation": {"mode": "all"}})
API = schemathesis.openapi.from_dict(openapi.document(Settings(model="x", **LIMITS)), config=CONFIG)
# A schema cannot say all that makes a request right (the bytes of an image), and null means the default everywhere.
NOT_CHECKED = [schemathesis.checks.positive_data_acceptance, schemathesis.checks.negative_data_rejection]


@pytest.fixture(scope="module")
def server(pipeline):
    with serving(pipeline, **LIMITS) as server:
        yield server


@API.parametrize()
@settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_every_response_to_any_request_is_one_that_the_document_describes(case, server):
    case.call_and_validate(base_url=f"http://127.0.0.1:{server.port}", excluded_checks=NOT_CHECKED)


def test_the_document_has_every_route_and_the_limits_of_the_server(server, pipeline):
    document = server.call("GET", "/openapi.json")[1]
    with TestClient(app(pipeline)) as client:
        routes = {route.path for route in client.app.routes}
    assert set(document["paths"]) == routes - {"/", "/openapi.json", "/docs"}
    fields = document["components"]["schemas"]["ChatFields"]["properties"]
    assert fields["max_new_tokens"]["maximum"] == 4 and fields["message"]["maxLength"] == 8000


def test_the_page_names_every_route_and_field_and_loads_nothing(server):
    document, page = server.call("GET", "/openapi.json")[1], server.read("GET", "/docs")[1]
    for path in document["paths"]:
        assert path in page
    for schema in document["components"]["schemas"].values():
        for name in schema.get("properties", ()):
            assert f"<td>{name}<td>" in page
    assert re.findall(r'(?:href|src)="(?!#)([^"]*)"', page) == ["openapi.json"] and "://" not in page
