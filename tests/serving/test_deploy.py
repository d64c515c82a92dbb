"""The files in deploy/: nginx really stands before two servers; what cannot be started here is checked against the code."""

import json
import re
import shutil
import socket
import subprocess
from contextlib import ExitStack

import pytest
import yaml

from conftest import ROOT
from mmllm.serving.settings import Settings, variable
from official import write_model
from server_process import RealServer, start_server, wait_until

NGINX = (ROOT / "deploy" / "nginx.conf").read_text()
SETTINGS = {variable(name) for name in Settings.model_fields}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def proxied(tmp_path):
    """Two servers, their processes, and nginx before them with the file in deploy/."""
    if not shutil.which("nginx"):
        pytest.skip("needs nginx")
    folder, port, replicas = write_model(tmp_path / "model"), free_port(), []
    text = NGINX.replace("listen 8000", f"listen 127.0.0.1:{port}")
    with ExitStack() as stack:
        for number in (1, 2):
            process, its_port = start_server(folder, tmp_path / f"log{number}")
            stack.callback(process.wait)
            stack.callback(process.kill)
            replicas.append((process, RealServer(its_port, tmp_path / f"log{number}")))
            text = text.replace(f"replica{number}:8000", f"127.0.0.1:{its_port}")
        paths = "".join(f"{kind}_temp_path {kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        text = (
            f"daemon off; pid nginx.pid; error_log stderr;\n{text.replace('http {', 'http { access_log off;' + paths)}"
        )
        (tmp_path / "nginx.conf").write_text(text)
        command = ["nginx", "-e", "stderr", "-p", str(tmp_path), "-c", "nginx.conf"]
        subprocess.run([*command, "-t"], check=True, capture_output=True)
        proxy = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        stack.callback(proxy.terminate)
        for _, replica in replicas:
            replica.wait_until_loaded()
        server = RealServer(port, None)
        wait_until(lambda: answers(server))
        yield server, replicas


def answers(server: RealServer) -> bool:
    try:
        return server.call("GET", "/health")[0] == 200
    except OSError:
        return False


def turn(server: RealServer, name: str) -> int:
    body = json.dumps({"message": "Hello", "max_new_tokens": 2, "conversation_id": name}).encode()
    status, answer = server.call(
        "POST", "/chat", body, **{"Content-Type": "application/json", "X-Conversation-ID": name}
    )
    assert status == 200
    return answer["turn"]


@pytest.mark.slow
def test_a_conversation_stays_with_its_replica_and_the_others_answer_when_one_ends(proxied):
    server, replicas = proxied
    names = [f"c{i}" for i in range(12)]
    assert [[turn(server, name) for name in names] for _ in range(3)] == [[1] * 12, [2] * 12, [3] * 12]
    served = [replica.log.read_text().count('"path": "/chat"') for _, replica in replicas]
    assert sum(served) == 36 and min(served) >= 3
    replicas[0][0].kill()
    replicas[0][0].wait()
    turns = [turn(server, name) for name in names]  # those of the other replica go on, the rest begin again
    assert turns.count(4) == served[1] // 3 and turns.count(1) == served[0] // 3
    assert server.call("POST", "/chat", b"{", **{"Content-Type": "application/json"})[0] == 400


def test_the_compose_file_starts_what_the_proxy_names():
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    replicas = re.findall(r"server (\w+):8000;", NGINX)
    assert (
        [name for name in compose["services"] if name != "proxy"]
        == replicas
        == list(compose["services"]["proxy"]["depends_on"])
    )
    for name in replicas:
        environment = compose["services"][name]["environment"]
        assert set(environment) <= SETTINGS and ":?" in environment["MMLLM_API_KEY"]  # no start without a key
    for mounted in compose["services"]["proxy"]["volumes"]:
        assert (ROOT / "deploy" / mounted.partition(":")[0]).exists()


def test_the_image_and_the_unit_name_only_settings_and_files_that_exist():
    dockerfile, unit = ((ROOT / name).read_text() for name in ("Dockerfile", "deploy/mmllm.service"))
    assert set(re.findall(r"MMLLM_[A-Z_]+", dockerfile + unit)) <= SETTINGS
    assert "MMLLM_REQUIRE_KEY=1" in dockerfile
    for names in re.findall(r"^COPY (.+) \S+$", dockerfile, re.M):
        assert all((ROOT / name).exists() for name in names.split())
    assert f"client_max_body_size {Settings().max_body_mb:g}m" in NGINX


def test_systemd_accepts_the_unit(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    unit = (ROOT / "deploy" / "mmllm.service").read_text().replace("/opt/mmllm/.venv/bin/python", "/bin/true")
    (tmp_path / "mmllm.service").write_text(unit)
    result = subprocess.run(["systemd-analyze", "verify", tmp_path / "mmllm.service"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
