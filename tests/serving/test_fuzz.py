"""No input makes the server fail: whatever the fields and bytes, the answer is a result or an error of the client's.

The suite tries a few inputs, the same ones each time; `make fuzz` tries MMLLM_FUZZ of each kind, new ones each time.
"""

import base64
import json
import os
import resource

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from server_process import IMAGE, app, encode, error_of, read_response, serving, wait_until_loaded

EXAMPLES = int(os.environ.get("MMLLM_FUZZ", "0"))
MB = 1024  # of ru_maxrss


def tries(count: int):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=EXAMPLES or count,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=checks,
        print_blob=bool(EXAMPLES),
    )


@pytest.fixture(scope="module")
def client(pipeline):
    """A client whose server may not grow by more than 300 MB at any moment."""
    with TestClient(app(pipeline, max_new_tokens=8, conversations=20)) as client:
        wait_until_loaded(client)
        assert client.post("/caption", files={"image": IMAGE}, data={"max_new_tokens": 2}).status_code == 200
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield client
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * MB


def check(response) -> None:
    assert response.status_code < 500
    if response.status_code != 200:
        error_of(response)


# What a field may hold: right, nearly right, and anything.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "\x00"]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TOKENS = st.one_of(st.integers(1, 3), st.sampled_from([0, -1, 10**9, "2", 1.5, True, [1]]))
PARTS = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": SCALARS}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": SCALARS})}),
    ANYTHING,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool", 1]),
            "content": st.lists(PARTS, max_size=2) | SCALARS,
        }
    ),
    max_size=3,
)
FIELDS = dict.fromkeys(
    ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "stream", "else"), ANYTHING
)
CHAT = st.fixed_dictionaries(
    {"message": st.text(max_size=30) | ANYTHING, "max_new_tokens": TOKENS},
    optional=FIELDS | {"image_base64": ANYTHING, "conversation_id": ANYTHING, "reset": ANYTHING},
)
COMPLETION = st.fixed_dictionaries(
    {"messages": MESSAGES | ANYTHING, "max_tokens": TOKENS},
    optional=FIELDS | {"n": ANYTHING, "logprobs": ANYTHING, "response_format": ANYTHING, "stream_options": ANYTHING},
)


@pytest.mark.slow
@tries(80)
@given(body=st.one_of(CHAT, COMPLETION, ANYTHING), path=st.sampled_from(["/chat", "/v1/chat/completions"]))
def test_no_json_makes_the_server_fail(client, body, path):
    content = json.dumps(body).encode()  # with NaN, Infinity and lone surrogates, as a careless client sends them
    check(client.post(path, content=content, headers={"Content-Type": "application/json"}))


@tries(40)
@given(data=st.binary(max_size=200), path=st.sampled_from(["/chat", "/v1/chat/completions", "/caption", "/question"]))
def test_no_bytes_make_the_server_fail(client, data, path):
    for kind in ("application/json", "multipart/form-data; boundary=b"):
        check(client.post(path, content=data, headers={"Content-Type": kind}))


NAMES = st.sampled_from(
    ["prompt", "question", "max_new_tokens", "temperature", "seed", "stop", "stream", "image", "else"]
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@tries(40)
@given(
    fields=st.lists(st.tuples(NAMES, TEXT), max_size=5),
    cut=st.integers(0, 400),
    name=TEXT,
    path=st.sampled_from(["/caption", "/question"]),
)
def test_no_form_makes_the_server_fail(client, fields, cut, name, path):
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode() for key, value in fields
    ]
    file = f'--b\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
    body = b"".join([*parts, file, IMAGE, b"\r\n--b--\r\n"])
    for content in (body, body[:cut], body[cut:]):
        check(client.post(path, content=content, headers={"Content-Type": "multipart/form-data; boundary=b"}))


SMALL = Image.radial_gradient("L").resize((40, 30))
FRAMES = {"save_all": True, "append_images": [SMALL.convert("RGB").rotate(90), SMALL.convert("RGB")]}
IMAGES = [
    encode(kind, SMALL.convert(mode), **options)
    for kind, mode, options in (
        ("PNG", "RGB", {}),
        ("PNG", "P", {"transparency": 0}),
        ("PNG", "I;16", {}),
        ("PNG", "RGB", FRAMES),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "CMYK", {"exif": Image.Exif()}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", FRAMES),
        ("GIF", "RGB", FRAMES),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    )
]


@st.composite
def mutated(draw) -> bytes:
    """An image file with bytes changed, cut out, doubled or put in; half of the places are in its headers."""
    data = bytearray(draw(st.sampled_from(IMAGES)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, 64) | st.integers(0, 5000)) % max(1, len(data))
        match draw(st.integers(0, 3)):
            case 0:
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=4))
            case 1:
                del data[place : place + draw(st.integers(1, 50))]
            case 2:
                data[place:place] = data[place : place + draw(st.integers(1, 50))]
            case 3:
                data[place : place + 4] = draw(st.sampled_from([b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4)]))
    return bytes(data)


@pytest.mark.slow
@tries(150)
@given(image=mutated())
def test_no_image_makes_the_server_fail(client, image):
    check(client.post("/caption", files={"image": image}, data={"max_new_tokens": "1"}))
    if EXAMPLES:
        uri = "data:image/png;base64," + base64.b64encode(image).decode()
        check(client.post("/chat", json={"message": "?", "max_new_tokens": 1, "image_base64": uri}))


HEAD = b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\nX-Request-ID: a\r\n\r\n{}"


@pytest.fixture(scope="module")
def server(pipeline):
    with serving(pipeline, header_timeout_s=0.2, body_timeout_s=0.2) as server:
        yield server


@tries(30)
@given(place=st.integers(0, len(HEAD)), new=st.binary(max_size=8), cut=st.integers(0, 8))
def test_no_bytes_on_the_connection_make_the_server_fail(server, place, new, cut):
    with server.send(HEAD[:place] + new + HEAD[place + cut :]) as connection:
        connection.settimeout(20)
        if connection.recv(1, 2):  # MSG_PEEK; else closed without an answer: no request came
            assert read_response(connection)[0] < 500
    assert server.call("GET", "/health")[0] == 200
