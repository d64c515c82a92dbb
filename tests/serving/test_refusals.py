"""What the server answers to every wrong request."""

import base64
import json
import zlib

import pytest
from PIL import Image
from starlette.testclient import TestClient

from server_process import (
    BASE64,
    IMAGE,
    app,
    encode,
    error_of,
    png_chunk,
    post_chat,
    post_image,
    serving,
    wait_until_loaded,
)


@pytest.mark.parametrize(
    "method, path, status, code",
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/caption", 405, "method_not_allowed"),
        ("OPTIONS", "/caption", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("DELETE", "/chat/a%20b", 400, "invalid_value"),
    ],
)
def test_a_wrong_path_or_method_has_the_error_shape_of_all_others(client, method, path, status, code):
    response = client.request(method, path)
    assert error_of(response)[:2] == (status, code)
    assert (status == 405) == ("allow" in response.headers)


def test_other_origins_are_not_allowed(client):
    response = client.get("/health", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("given, kept", [("abc-1.2_x", True), ("x" * 65, False), ("a b", False), ("é", False)])
def test_a_request_id_is_kept_when_it_is_harmless(client, given, kept):
    response = client.get("/health", headers={"X-Request-ID": given.encode()})
    assert (response.headers["x-request-id"] == given) == kept


@pytest.mark.parametrize(
    "body",
    [
        b'{"message": [' + b"0," * 100_000 + b"0]}",
        b"{bad",
        b"",
        b"[1]",
        b'"x"',
        b"1" * 5000,
        b"[" * 100_000,
        '{"message": "x"}'.encode("utf-16"),
        b"\xff{}",
    ]
    + [b'{"message": "x", "temperature": NaN}', b'{"message": "x", "temperature": -Infinity}'],
)
def test_what_is_not_a_json_object_is_refused(client, body):
    response = client.post("/chat", content=body, headers={"Content-Type": "application/json"})
    assert error_of(response) == (400, "invalid_json", None)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_chat_takes_json_only_and_says_how_to_send_it(client, kind):
    response = client.post("/chat", content=b'{"message": "x"}', headers={"Content-Type": kind} if kind else {})
    assert error_of(response)[:2] == (415, "unsupported_media_type")
    assert "Content-Type: application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "values, code, param",
    [
        ({"message": "\ud800"}, "invalid_unicode", "message"),
        ({"conversation_id": "\ud800"}, "invalid_unicode", "conversation_id"),
        ({"image_base64": "\ud800"}, "invalid_unicode", "image_base64"),
        ({"\ud800": 1}, "unknown_field", "\ud800"),
        ({"max_tokens": 1}, "unknown_field", "max_tokens"),
        ({"a." * 100 + "message": 1}, "unknown_field", "a." * 50),
        ({"message": None}, "missing_field", "message"),
        ({"message": " \n"}, "empty_message", "message"),
        ({"message": "a" * 8001}, "message_too_long", "message"),
        ({"message": 5}, "invalid_value", "message"),
        ({"image_base64": [BASE64, BASE64]}, "invalid_value", "image_base64"),
        ({"reset": "yes"}, "invalid_value", "reset"),
        ({"conversation_id": "../x"}, "invalid_value", "conversation_id"),
        ({"conversation_id": "x" * 65}, "invalid_value", "conversation_id"),
        ({"conversation_id": ""}, "invalid_value", "conversation_id"),
        *[({"max_new_tokens": value}, "invalid_value", "max_new_tokens") for value in ("ten", "10", True, 1.5, [])],
        *[({"max_new_tokens": value}, "invalid_value", "max_new_tokens") for value in (0, -1, 513, 10**9)],
        *[({"temperature": value}, "invalid_value", "temperature") for value in (-1, 3, "1", "inf", True, 10**400)],
        *[({"top_p": value}, "invalid_value", "top_p") for value in (0, 2, -0.1)],
        *[({"top_k": value}, "invalid_value", "top_k") for value in (-5, 1.5)],
        *[({"repetition_penalty": value}, "invalid_value", "repetition_penalty") for value in (0, 3)],
        ({"min_p": 1.5}, "invalid_value", "min_p"),
        *[({"seed": value}, "invalid_value", "seed") for value in (-(2**70), 2**64, 2**63, 1.5, True)],
    ],
)
def test_a_wrong_json_field_is_named(client, values, code, param):
    body = json.dumps({"message": "Hello"} | values)
    response = client.post("/chat", content=body, headers={"Content-Type": "application/json"})
    assert error_of(response) == (400, code, param)


@pytest.mark.parametrize("values", [{"max_new_tokens": None, "seed": None}, {"temperature": 1e-9}, {"seed": 2**63 - 1}])
def test_null_is_the_default_and_a_tiny_temperature_is_greedy(client, values):
    wanted = post_chat(client, max_new_tokens=100, temperature=0).json()["response"]
    response = post_chat(client, **{"max_new_tokens": 100} | values)
    assert response.status_code == 200 and response.json()["response"] == wanted


def test_the_error_for_a_misspelt_field_names_the_nearest_one(client):
    assert "did you mean max_new_tokens?" in post_chat(client, max_new_token=5).json()["error"]["message"]
    assert "did you mean question?" in post_image(client, "/question", qestion="x").json()["error"]["message"]


@pytest.mark.parametrize(
    "fields, code, param",
    [
        ({"max_new_tokens": "ten"}, "invalid_value", "max_new_tokens"),
        ({"max_new_tokens": "1e2"}, "invalid_value", "max_new_tokens"),
        ({"max_new_tokens": "9" * 5000}, "invalid_value", "max_new_tokens"),
        ({"temperature": "nan"}, "invalid_value", "temperature"),
        ({"temperature": "1.2.3"}, "invalid_value", "temperature"),
        ({"prompt": ""}, "empty_message", "prompt"),
        ({"prompt": ["a", "b"]}, "duplicate_field", "prompt"),
        ({"prompt": "a" * 70_000}, "invalid_form", None),
        ({"prompt": "a" * 9_000}, "message_too_long", "prompt"),
        ({"question": "x"}, "unknown_field", "question"),
        ({f"field{i}": "x" for i in range(40)}, "invalid_form", None),
    ],
)
def test_a_wrong_form_field_is_named(client, fields, code, param):
    assert error_of(post_image(client, **fields)) == (400, code, param)


@pytest.mark.parametrize(
    "path, parts, code, param, says",
    [
        ("/question", [("image", ("x.png", IMAGE))], "missing_field", "question", "question"),
        ("/caption", [("prompt", (None, "x"))], "missing_field", "image", '-F "image=@file.jpg"'),
        ("/caption", [("image", (None, "photo.jpg"))], "not_a_file", "image", '-F "image=@file.jpg"'),
        ("/caption", [("image", ("a.png", IMAGE)), ("image", ("b.png", IMAGE))], "too_many_images", "image", "once"),
    ],
)
def test_what_a_form_must_have_is_named_with_the_way_to_send_it(client, path, parts, code, param, says):
    response = client.post(path, files=parts)
    assert error_of(response) == (400, code, param)
    assert says in response.json()["error"]["message"]


FILE_PART = b'--B\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n'
FORM_PART = b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'


@pytest.mark.parametrize(
    "kind, body, status, code",
    [
        ("multipart/form-data", b"x", 400, "invalid_form"),
        ("multipart/form-data; boundary=B", b"", 400, "truncated_form"),
        ("multipart/form-data; boundary=B", b"--B\r\nContent-Disposition: form-data; na", 400, "truncated_form"),
        ("multipart/form-data; boundary=B", b"garbage --B-- garbage", 400, "invalid_form"),
        ("multipart/form-data; boundary=B", FORM_PART + b"\xff\r\n--B--\r\n", 400, "invalid_form"),
        ("multipart/form-data; boundary=B", FORM_PART + b"x --B-- is in here\r\n", 400, "truncated_form"),
        ("multipart/form-data; boundary=B", FILE_PART + IMAGE[:500], 400, "truncated_form"),
        ("multipart/form-data; boundary=B", b"--B\r\nX: y\r\n\r\nz\r\n--B--\r\n", 400, "invalid_form"),
        ("multipart/form-data; boundary=B; charset=utf-7", b"--B--\r\n", 415, "unsupported_media_type"),
        ("application/json", b'{"prompt": "x"}', 415, "unsupported_media_type"),
        ("application/x-www-form-urlencoded", b"prompt=x", 415, "unsupported_media_type"),
        ("", b"", 415, "unsupported_media_type"),
    ],
)
def test_a_body_that_is_not_a_complete_form_is_refused(client, kind, body, status, code):
    response = client.post("/caption", content=body, headers={"Content-Type": kind})
    assert error_of(response) == (status, code, None)
    assert (status == 415) == ("or JSON to /chat" in response.json()["error"]["message"])


@pytest.mark.parametrize("name", ["../../etc/passwd", "x" * 4000, "图片.png", "a\r\nb"])
def test_the_name_of_a_file_does_not_matter(client, name):
    assert client.post("/caption", files={"image": (name, IMAGE)}, data={"max_new_tokens": "2"}).status_code == 200


def with_chunk(name: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    return IMAGE[:33] + png_chunk(name, data) + IMAGE[33:]


BOMB = zlib.compress(bytes(10_000_000))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"


@pytest.mark.parametrize(
    "image, status, code",
    [
        (b"", 400, "empty_image"),
        (b"hello", 415, "unsupported_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_image"),
        (b"%PDF-1.7\n", 415, "unsupported_image"),
        (b"PK\x03\x04" + bytes(100), 415, "unsupported_image"),
        (b"\xff\x0a\x1f\x07\x44" + bytes(100), 415, "unsupported_image"),
        (EPS, 415, "unsupported_image"),
        (IMAGE[: len(IMAGE) // 2], 400, "corrupt_image"),
        (encode("JPEG")[:500], 400, "corrupt_image"),
        (encode(image=Image.new("1", (10_000, 10_000))), 413, "image_too_large"),
        (encode(image=Image.new("L", (1, 40_000))), 400, "image_aspect"),
        (with_chunk(b"zTXt", b"x\0\0" + BOMB), 400, "corrupt_image"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value),
)
def test_an_unusable_image_is_refused_with_our_own_message(client, image, status, code):
    assert error_of(post_image(client, image=image)) == (status, code, "image")
    uri = base64.b64encode(image).decode()
    assert error_of(post_chat(client, image_base64=uri)) == (status, code, "image_base64")


@pytest.mark.parametrize(
    "text, code",
    [
        ("not base64!", "invalid_base64"),
        ("abc", "invalid_base64"),
        (BASE64.replace("+", "-").replace("/", "_"), "invalid_base64"),
        ("data:image/png;base64", "invalid_base64"),
        ("data:image/png," + BASE64, "invalid_base64"),
        ("/etc/passwd", "invalid_base64"),
        ("http://169.254.169.254/latest/meta-data", "image_url_not_supported"),
        (" HTTPS://example.org/x.png", "image_url_not_supported"),
        ("file:///etc/passwd", "image_url_not_supported"),
        ("", "empty_image"),
    ],
)
def test_only_base64_is_an_image_and_nothing_is_fetched(client, text, code):
    assert error_of(post_chat(client, image_base64=text)) == (400, code, "image_base64")


def test_an_api_key_guards_everything_but_health(pipeline):
    with TestClient(app(pipeline, api_key="s3cret")) as client:
        wait_until_loaded(client)
        response = post_chat(client)
        assert error_of(response)[:2] == (401, "invalid_api_key") and response.headers["www-authenticate"] == "Bearer"
        assert error_of(client.delete("/chat/a"))[0] == error_of(post_image(client))[0] == 401
        wrong = client.post("/chat", json={"message": "x"}, headers={"Authorization": "Bearer é".encode()})
        assert error_of(wrong)[0] == 401
        headers = {"Authorization": "Bearer s3cret"}
        right = client.post("/chat", json={"message": "x", "max_new_tokens": 2}, headers=headers)
        assert right.status_code == 200


def test_a_key_is_compared_as_the_bytes_that_were_sent(pipeline):
    with serving(pipeline, api_key="schlüssel") as server:
        for encoding, status in (("utf-8", 204), ("latin-1", 401)):
            request = "DELETE /chat/a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer schlüssel\r\n\r\n"
            with server.send(request.encode(encoding)) as connection:
                assert connection.recv(12) == f"HTTP/1.1 {status}".encode()


def test_the_error_for_a_large_body_names_both_sizes(pipeline):
    with TestClient(app(pipeline, max_body_mb=0.5)) as client:
        response = post_image(wait_until_loaded(client), image=bytes(1_000_000))
        assert error_of(response)[:2] == (413, "body_too_large")
        assert "1.0 MB; the limit is 0.5 MB (MMLLM_MAX_BODY_MB)" in response.json()["error"]["message"]


def test_bodies_that_are_being_read_are_bounded_together(pipeline):
    with TestClient(app(pipeline, max_reading_mb=0.5)) as client:
        response = post_image(wait_until_loaded(client), image=bytes(1_000_000))
        assert error_of(response)[:2] == (429, "overloaded") and response.headers["retry-after"] == "1"
        assert post_chat(client).status_code == 200


def test_a_bug_is_an_error_with_the_request_id_and_nothing_else(client, caplog):
    store, client.app.state.service.conversations = client.app.state.service.conversations, None
    response = post_chat(client)
    client.app.state.service.conversations = store
    assert error_of(response)[:2] == (500, "internal_error")
    assert response.headers["x-request-id"] in response.json()["error"]["message"]
