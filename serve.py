"""Serve a trained model over HTTP.

    python serve.py                                  # the newest model under outputs/, on http://127.0.0.1:8000
    python serve.py --model models/start --port 8001
    uvicorn serve:app                                # the same, run by uvicorn; one process, never --workers

    curl -X POST "http://localhost:8000/caption" -F "image=@image.jpg" -F "prompt=Describe this image"

Every limit has an environment variable: see mmllm/serving/settings.py.
"""

import argparse
import errno
import os
import socket
import sys
from dataclasses import replace

from mmllm.config.schema import PRECISIONS
from mmllm.errors import RunError, UserError, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="directory or hub name (default: the newest under outputs/)")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, help="(default: 8000)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", choices=PRECISIONS, help="(default: bfloat16 on CUDA, else float32; see the README)")
    return parser.parse_args(arguments)


def __getattr__(name: str):
    """`serve.app`, made when it is asked for: importing this file does nothing."""
    if name != "app":
        raise AttributeError(f"module 'serve' has no attribute {name!r}")
    return make_app(settings_for({}))


def settings_for(flags: dict[str, object]):
    """The server's Settings: a flag wins over the environment, and the model is one that is there."""
    from mmllm.inference.pipeline import default_model
    from mmllm.serving.settings import Settings

    settings = replace(Settings.from_environment(os.environ), **flags)
    return replace(settings, model=settings.model or str(default_model()))


def make_app(settings):
    from mmllm.inference.pipeline import load_pipeline
    from mmllm.serving.app import create_app

    return create_app(lambda: load_pipeline(settings.model, device=settings.device, dtype=settings.dtype), settings)


def listen(host: str, port: int) -> socket.socket:
    """The listening socket; before the model is loaded, since a port that is taken should be known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RunError(f"port {port} is taken; choose another one, such as --port {port + 1}") from error
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror}); see --host and --port") from error


def main() -> int:
    flags = {name: value for name, value in vars(parse()).items() if value is not None}
    # torch takes two seconds to import: only now that the command line is known to be right
    settings = settings_for(flags)
    listener = listen(settings.host, settings.port)
    import logging

    from mmllm.serving.app import Server

    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    host, port = listener.getsockname()[:2]
    print(
        f"{settings.model} on http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C stops it)", file=sys.stderr
    )
    if not host.startswith("127.") and host != "::1" and not settings.api_key:
        print("warning: anyone who reaches this port can use the model; set MMLLM_API_KEY", file=sys.stderr)
    return Server(make_app(settings), settings).serve_until_signal(listener)


if __name__ == "__main__":
    run(main)
