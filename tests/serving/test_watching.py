"""What an operator sees: /metrics, /livez, /health, the log; and what pages of other origins may do."""

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from mmllm.data.image import decode
from mmllm.errors import UserError
from mmllm.serving.settings import Settings
from server_process import BASE64, app, error_of, post_chat, post_image, serving, wait_until, wait_until_loaded


@pytest.fixture(scope="module")
def server(pipeline):
    with serving(pipeline) as server:
        yield server


def samples(text: str) -> dict[tuple, float]:
    """The value of each name and its labels."""
    families = text_string_to_metric_families(text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_the_metrics_count_requests_tokens_and_times(server):
    before = samples(server.read("GET", "/metrics")[1])
    usages = [server.chat(image_base64=BASE64, max_new_tokens=7)[1]["usage"] for _ in range(2)]
    assert server.chat(max_new_tokens=0)[0] == 400
    assert server.call("GET", "/secret-path")[0] == 404
    text = server.read("GET", "/metrics")[1]
    after = samples(text)
    assert "secret" not in text

    def added(*key) -> float:
        return after[key] - before.get(key, 0)

    assert added("mmllm_requests_total", "/chat", "200") == 2
    assert added("mmllm_requests_total", "/chat", "400") == 1
    assert added("mmllm_requests_total", "other", "404") == 1
    for name in ("queue_seconds", "time_to_first_token_seconds", "tokens_per_second"):
        assert added(f"mmllm_{name}_count") == 2
    assert added("mmllm_generated_tokens_total") >= 12
    read = added("mmllm_prompt_tokens_total") + added("mmllm_reused_tokens_total")
    assert read == sum(usage["prompt_tokens"] for usage in usages)
    assert added("mmllm_store_hits_total") > 0
    assert added("mmllm_prefill_seconds_total") > 0 and added("mmllm_decode_seconds_total") > 0
    assert after[("mmllm_slots",)] == 8 and after[("mmllm_slots_busy",)] == after[("mmllm_requests_waiting",)] == 0
    assert after[("process_resident_memory_bytes",)] > 1e7


def test_the_key_guards_the_metrics_and_not_the_probes(pipeline):
    with TestClient(app(pipeline, api_key="s3cret")) as client:
        assert error_of(client.get("/metrics"))[0] == 401
        assert client.get("/metrics", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert client.get("/livez").json() == {"status": "alive"}
        wait_until_loaded(client)


def test_the_log_line_of_a_request_is_json_with_its_times_and_without_its_text(server, caplog):
    with caplog.at_level(logging.INFO, "mmllm.serving"):
        server.chat(message="a secret question", image_base64=BASE64)
        wait_until(lambda: "/chat" in caplog.text)
    line = json.loads(next(record.message for record in caplog.records if "/chat" in record.message))
    assert line["method"] == "POST" and line["status"] == 200
    assert {"id", "ms", "queue_ms", "prefill_ms", "decode_ms", "prompt_tokens", "completion_tokens"} <= line.keys()
    assert line["ms"] + 2 >= line["queue_ms"] + line["prefill_ms"] + line["decode_ms"]
    assert "secret" not in caplog.text


def test_health_is_false_while_an_image_stands_still(pipeline, monkeypatch):
    may_go_on = threading.Event()

    def slow_decode(data, name, **options):
        may_go_on.wait()
        return decode(data, name, **options)

    monkeypatch.setattr("mmllm.serving.service.decode", slow_decode)
    monkeypatch.setattr("mmllm.serving.service.STALLED_AFTER_S", 0.2)
    with TestClient(app(pipeline)) as client, ThreadPoolExecutor(1) as others:
        wait_until_loaded(client)
        waiting = others.submit(post_image, client)
        wait_until(lambda: client.get("/health").status_code == 503)
        assert client.get("/health").json()["status"] == "stalled" and client.get("/livez").status_code == 200
        may_go_on.set()
        assert waiting.result().status_code == 200
        assert client.get("/health").json()["status"] == "ok"


def test_health_is_false_while_answers_stand_still(pipeline, monkeypatch):
    may_go_on = threading.Event()
    monkeypatch.setattr("mmllm.serving.service.STALLED_AFTER_S", 0.2)
    with TestClient(app(pipeline)) as client, ThreadPoolExecutor(1) as others:
        engine = wait_until_loaded(client).app.state.service.worker.engine
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: may_go_on.wait() and step())
        waiting = others.submit(post_chat, client)
        wait_until(lambda: client.get("/health").json()["status"] == "stalled")
        may_go_on.set()
        assert waiting.result().status_code == 200
        assert client.get("/health").json()["status"] == "ok"


def test_pages_of_the_origins_in_the_setting_may_use_the_server(pipeline):
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with TestClient(app(pipeline, cors_origins="https://a.example, http://localhost:3000")) as client:
        wait_until_loaded(client)
        for origin, allowed in (("https://a.example", True), ("https://evil.example", False)):
            response = client.options("/v1/chat/completions", headers={"Origin": origin, **asks})
            assert (response.headers.get("access-control-allow-origin") == origin) == allowed
            response = client.get("/v1/models", headers={"Origin": origin})
            assert (response.headers.get("access-control-allow-origin") == origin) == allowed
            assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize("origins", ["example.org", "https://a.example/", "https://a.example https://b.example"])
def test_an_origin_that_is_none_is_refused_at_the_start(origins):
    with pytest.raises(UserError, match="MMLLM_CORS_ORIGINS has"):
        Settings.from_environment({"MMLLM_CORS_ORIGINS": origins})
