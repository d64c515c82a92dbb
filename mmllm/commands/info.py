"""Show what a model directory, a published model or one weights file holds: kind, sizes, precision, training.

mmllm info outputs/demo/best_model
mmllm info Qwen/Qwen2.5-0.5B-Instruct
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmllm.commands import make_parser
from mmllm.errors import CheckpointError
from mmllm.runtime.files import read_json, typed


@dataclass(frozen=True)
class _Trained:
    """What training/state.json of a checkpoint says about its origin."""

    stage: int
    step: int
    epoch: int
    best: dict[str, object] = field(default_factory=dict)
    data_sha256: dict[str, str] = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("info", __doc__)
    parser.add_argument("model", metavar="SOURCE", help="a directory, a hub name or a file of weights")
    for name, value in about(parser.parse_args(arguments).model):
        print(f"{name:16}{value}")


def about(source: str) -> list[tuple[str, str]]:
    """Names and values, in the order in which they are shown."""
    from mmllm.models.config import TEXT, VISION, tower_config
    from mmllm.models.published import read_file, read_vision
    from mmllm.storage.hub import locate
    from mmllm.storage.weights import read_tensors

    path = Path(source).expanduser()
    if path.is_file():
        return [("kind", "a file of OpenAI's CLIP"), *tower(read_vision(path).config), *weights(read_file(path))]
    folder = locate(source)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if config.get("model_type") in ("llava", "mmllm_pooled"):
        return joined(folder)
    if config.get("model_type") in [*VISION, *TEXT]:
        kind, sizes = config["model_type"], tower_config(config, VISION | TEXT, folder / "config.json")
        return [("kind", f"a published model, {kind}"), *tower(sizes), *weights(read_tensors(folder))]
    if (folder / "open_clip_config.json").exists():
        vision = read_vision(folder)
        return [("kind", "a vision tower of open_clip"), *tower(vision.config), *weights(vision.tensors)]
    if (folder / "best_model").exists():
        return [("kind", f"a run; this is {folder / 'best_model'}"), *joined(folder / "best_model")]
    raise CheckpointError(f"{folder}: neither a model nor a run; it has no config.json of a known model_type")


def joined(folder: Path) -> list[tuple[str, str]]:
    from mmllm.layers.lora import read_adapter
    from mmllm.models.loading import read_info
    from mmllm.storage.weights import read_tensors

    info = read_info(folder)
    is_ours = (folder / "mmllm.json").exists()
    lines = [("kind", "a model of mmllm" if is_ours else "a LLaVA model of other makers")]
    lines += [*tower(info.config.vision), *tower(info.config.text)]
    lines.append(("image", f"{info.config.num_image_tokens} tokens ({info.config.features} features)"))
    lines += weights(read_tensors(folder))
    if kind := info.packed or info.rounding:
        lines.append(("stored for", f"answering in {kind}" if info.packed else f"{kind} under adapters"))
    if info.has_adapters:
        lora, _, _ = read_adapter(folder)
        lines.append(("adapters", f"LoRA r={lora.r}, alpha={lora.lora_alpha}: {', '.join(lora.target_modules)}"))
    return [*lines, ("system prompt", repr(info.system_prompt)), *training(folder)]


def tower(config) -> list[tuple[str, str]]:
    """The sizes of one tower in a line, under the name of its kind."""
    return [(config.model_type.removesuffix("_vision_model"), ", ".join(f"{n} {v}" for n, v in asdict(config).items()))]


def weights(tensors: dict) -> list[tuple[str, str]]:
    counts: Counter[str] = Counter()
    for value in tensors.values():
        counts[str(value.dtype).removeprefix("torch.")] += value.numel()
    size = sum(value.nbytes for value in tensors.values())
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in counts.most_common())
    return [("weights", f"{kinds}; {size / 1e6:,.1f} MB in {len(tensors)} tensors")]


def training(folder: Path) -> list[tuple[str, str]]:
    """Where a checkpoint comes from: its step, its data, and the command of its run."""
    file = folder / "training" / "state.json"
    if not file.exists():
        return [("trained", "nothing is recorded here")]
    state = typed(_Trained, read_json(file), file)
    score = [f"{name} {value:.4g}" for name, value in state.best.items() if isinstance(value, float)]
    lines = [("trained", ", ".join([f"stage {state.stage}, epoch {state.epoch}, step {state.step}", *score]))]
    lines += [(f"{name} data", f"sha256 {digest}") for name, digest in state.data_sha256.items()]
    run = folder.resolve().parent / "run.json"
    starts = read_json(run).get("starts") if run.exists() else None
    if isinstance(starts, list) and starts and isinstance(starts[-1], dict):
        shown = ("command", "time", "device", "commit")
        lines += [(name, str(starts[-1][name])) for name in shown if starts[-1].get(name)]
    return lines
