"""Serve a trained model over HTTP: `mmllm serve` from a checkout. `uvicorn serve:app` works too."""

from mmllm.__main__ import start
from mmllm.commands.serve import app  # noqa: F401 - for uvicorn and gunicorn

if __name__ == "__main__":
    start("serve")
