"""Serve a trained model over HTTP: `mmllm serve` from a checkout. `uvicorn serve:app` works too."""

from mmllm.__main__ import start
from mmllm.commands import serve


def __getattr__(name: str) -> object:
    """`serve.app`, made when it is asked for: importing this file does nothing."""
    return getattr(serve, name)


if __name__ == "__main__":
    start("serve")
