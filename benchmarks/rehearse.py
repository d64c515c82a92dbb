"""A whole run of a configuration on random weights of the true shapes and noise images: does it fit, how long does it take?

All of train.py runs: loading, both stages, validation, checkpoints. A few steps mostly show whether a week of training
will succeed on this machine.
"""

import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from benchmarks.random_model import sizes, write_towers
from mmllm.errors import RunError
from mmllm.reporting.metrics import read_metrics
from mmllm.runtime.console import print_rank0
from mmllm.runtime.files import write_json

TRAIN = Path(__file__).parent.parent / "train.py"
CAPTION = "a small red cat sits on the old wooden table beside a cup of tea"


def write_samples(folder: Path, count: int, side: int) -> Path:
    """A data file of `count` noise images with a caption each; kept when it is there already."""
    path = folder / f"{count}-samples.json"
    if path.exists():
        return path
    (folder / "images").mkdir(parents=True, exist_ok=True)
    samples = []
    for i in range(count):
        image = folder / "images" / f"{i}.jpg"
        if not image.exists():
            Image.effect_noise((side, side), 80).convert("RGB").save(image)
        samples.append({"image": f"images/{i}.jpg", "text": CAPTION[i % 7 :]})
    write_json(path, samples)
    return path


def measure(spec: dict, config: str, samples: int, settings: list[str], folder: Path) -> list[dict]:
    """The row of one run of `config`, changed by `settings`."""
    shape = sizes(spec["size"], spec["layers"])
    name = f"{spec['size']}-{spec['layers'] or 'all'}-layers"
    clip, qwen = write_towers(folder / name / "towers", shape)
    data = write_samples(folder / "samples", samples, 224)
    few = write_samples(folder / "samples", 4, 224)
    run = folder / name / "runs" / "rehearsal"
    settings = [
        *(f"model.clip={clip}", f"model.qwen={qwen}", f"data.train_data_path={data}", f"data.val_data_path={few}"),
        *(f"output_dir={run.parent}", f"experiment_name={run.name}", f"device={spec['device']}"),
        *settings,
    ]
    begin = time.perf_counter()
    code = subprocess.run([sys.executable, str(TRAIN), config, "--overwrite", *settings], check=False).returncode
    seconds = time.perf_counter() - begin
    if code:
        raise RunError(f"{config} ended with code {code}, see above")
    steps = [row for row in read_metrics(run) if "loss" in row]
    row = {
        "case": config,
        "contestant": "mmllm",
        "settings": settings[7:],
        "samples": samples,
        "total_s": seconds,
        "steps": len(steps),
        "step_s": [round(step["ms"] / 1000, 3) for step in steps],
        "tokens_per_s": steps[-1]["tokens_per_s"],
        "mfu": steps[-1]["mfu"],
        "peak_bytes": max(step["peak_bytes"] for step in steps),
        "loss": [round(step["loss"], 4) for step in steps],
    }
    print_rank0(f"{config}: {len(steps)} steps in {seconds:.0f} s, {row['peak_bytes'] / 1e9:.2f} GB at most")
    return [row]
