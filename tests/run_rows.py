"""The files of a run as training leaves them, for tests of what is read from them."""

from pathlib import Path

from mmllm.config.schema import ExperimentConfig
from mmllm.reporting.metrics import RunLog

ROW = {
    "stage": 1,
    "step": 120,
    "loss": 2.5,
    "learning_rate": 9.8e-5,
    "grad_norm": 0.714,
    "ms": 404.3,
    "tokens_per_s": 9940.0,
    "images_per_s": 77.9,
    "mfu": 0.41,
    "peak_bytes": 11_200_000_000,
}
CAPTION = {"id": "7", "image": None, "prompt": "What is it?", "answer": "a | cat", "reference": "A cat."}
EVALUATION = {"stage": 1, "step": 120, "val_loss": 2.25, "val_loss_shuffled": 3.0, "captions": [CAPTION]}


def write_rows(directory: Path, *rows: dict) -> None:
    log = RunLog(directory)
    for row in rows:
        log.write(row)
    log.close()


def write_run(directory: Path, losses: list[float], **settings: str) -> Path:
    """A run with its settings, a row a loss, and a validation at the end that found the last loss."""
    config = ExperimentConfig()
    for name, value in settings.items():
        config.set_text(name, value)
    directory.mkdir()
    config.save(directory / "experiment.json")
    rows = [ROW | {"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    write_rows(directory, *rows, EVALUATION | {"step": len(losses), "val_loss": losses[-1]})
    return directory
