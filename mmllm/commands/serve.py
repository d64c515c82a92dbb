"""Serve a trained model over HTTP.

    mmllm serve                                   # the newest model under outputs/, on http://127.0.0.1:8000
    mmllm serve --model models/start --port 8001
    uvicorn serve:app --workers 4                 # the same in several processes, which share weights and conversations
    gunicorn serve:app -w 4 -k uvicorn.workers.UvicornWorker

    curl -X POST "http://localhost:8000/caption" -F "image=@image.jpg" -F "prompt=Describe this image"

On a CPU the weights are int8 unless --dtype says otherwise. Every limit has an environment variable: see
mmllm/serving/settings.py.
"""

import argparse
import errno
import logging
import os
import socket
import sys

from mmllm.commands import add_model_options, make_parser
from mmllm.errors import RunError, UserError
from mmllm.runtime.threads import limit_threads


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("serve", __doc__)
    add_model_options(parser)
    parser.set_defaults(device=None)  # the environment may name another one
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, help="(default: 8000)")
    return parser.parse_args(arguments)


class WorkerApp:
    """The application of a process that uvicorn or gunicorn started: made when that process is ready to serve."""

    app = None

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            try:
                self.app = make_worker_app()
            except (UserError, RunError) as error:
                await receive()
                await send({"type": "lifespan.startup.failed", "message": f"error: {error}"})
                return
        if self.app is None:
            raise RunError("the application was never started; start the server without --lifespan off")
        await self.app(scope, receive, send)


app = WorkerApp()


def make_worker_app():
    """The application of one of the processes of uvicorn or gunicorn, which share the machine and the conversations."""
    limit_threads()  # main() of mmllm has not run
    import torch

    from mmllm.inference.engine import SLOTS
    from mmllm.runtime.device import choose_device
    from mmllm.serving.conversations import shared_folder
    from mmllm.serving.server import adopt_, running_server, workers_of

    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    server, settings = running_server(), settings_for({})
    workers = workers_of(server)
    warn_if_open(server.config.host, settings)
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
        slots = settings.slots or max(1, SLOTS[choose_device(settings.device).type] // workers)
        part = {"slots": slots, "store_mb": settings.store_mb / workers, "state": settings.state or shared_folder()}
        settings = settings.model_copy(update=part)
    app = make_app(settings, is_shared=workers > 1)
    adopt_(server, app, settings)
    return app


def settings_for(flags: dict[str, object]):
    """The server's Settings: a flag wins over the environment; the model defaults to the newest one."""
    from mmllm.inference.pipeline import default_model
    from mmllm.serving.settings import Settings

    settings = Settings.from_environment(os.environ, **flags)
    return settings.model_copy(update={"model": settings.model or str(default_model())})


def make_app(settings, *, is_shared: bool = False):
    """The server's application; `is_shared`: other processes serve the same model."""
    from mmllm.inference.pipeline import load_pipeline
    from mmllm.kernels import cpu as kernels
    from mmllm.runtime.device import choose_device
    from mmllm.runtime.memory import return_freed_memory
    from mmllm.serving.app import create_app

    def load():
        # on a CPU float32 gains nothing from answering side by side; our int8 products do
        is_cpu = choose_device(settings.device).type == "cpu"
        default = "int8" if is_cpu and kernels.native() else "float32"
        dtype, source = settings.dtype or default, settings.model
        if is_shared and is_cpu and dtype in ("int8", "int4"):
            from mmllm.inference.packed_copy import packed_copy

            source = packed_copy(source, dtype)
        pipeline = load_pipeline(source, device=settings.device, dtype=settings.dtype, dtype_on_cpu=default)
        return_freed_memory()
        if is_cpu and not settings.dtype:
            message = f"weights in {pipeline.model.form.precision}, as no --dtype is given (float32 is full precision)"
            logging.getLogger("mmllm.serving").info(message)
        return pipeline

    return create_app(load, settings)


def listen(host: str, port: int) -> socket.socket:
    """The listening socket; opened before the model loads, so that a taken port is reported at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RunError(f"port {port} is taken; choose another one, such as --port {port + 1}") from error
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror}); see --host and --port") from error


def warn_if_open(host: str, settings) -> None:
    if not host.startswith("127.") and host not in ("::1", "localhost") and not settings.api_key:
        print("warning: anyone who reaches this port can use the model; set MMLLM_API_KEY", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    flags = {name: value for name, value in vars(parse(arguments)).items() if value is not None}
    # torch takes two seconds to import: only now that the command line is known to be right
    settings = settings_for(flags)
    listener = listen(settings.host, settings.port)
    from mmllm.serving.server import Server

    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"{settings.model} on http://{host}:{port} (Ctrl-C stops it)", file=sys.stderr)
    warn_if_open(listener.getsockname()[0], settings)
    return Server(make_app(settings), settings).serve_until_signal(listener)
