"""Parameters, steps and peak memory of a run before it begins: `train.py --dry-run`.

No weights are loaded. The model is built from its configuration, and its step runs on tensors without contents
(step_memory.py), so a laptop plans for a card that it does not have: `device=cuda:24GB`.
"""

import re
from dataclasses import replace

import torch

from mmllm.config.schema import ExperimentConfig, ModelConfig, StageConfig
from mmllm.layers.quantized import count_parameters, count_weights
from mmllm.models.config import CLIPVisionConfig, MultimodalConfig, Qwen2Config
from mmllm.models.multimodal import MultimodalLLM
from mmllm.models.published import text_config, vision_config
from mmllm.runtime.device import choose_device
from mmllm.runtime.files import read_json
from mmllm.storage.hub import locate
from mmllm.training.data_plan import DataPlan, plan_data
from mmllm.training.out_of_memory import batch_names, changes
from mmllm.training.prepare import prepare, train_only_, trained_parts
from mmllm.training.step_memory import Memory, stage_memory, uncompiled

PUBLISHED_CLIP = {"openai/clip-vit-base-patch32": CLIPVisionConfig()}
QWEN_SIZES = {  # hidden, intermediate, layers, heads, key and value heads, head
    "0.5B": (896, 4864, 24, 14, 2, 64),
    "1.5B": (1536, 8960, 28, 12, 2, 128),
    "3B": (2048, 11008, 36, 16, 2, 128),
}
PUBLISHED_QWEN = {
    f"Qwen/Qwen2.5-{name}{kind}": Qwen2Config(Qwen2Config.vocab_size, *sizes)
    for name, sizes in QWEN_SIZES.items()
    for kind in ("", "-Instruct")
}
USABLE = 0.9  # of a card's memory: the driver's context and gaps between blocks take the rest
STEPS_AN_EPOCH = 10  # aimed at where there is too little data for one step


def architecture(settings: ModelConfig) -> MultimodalConfig:
    """The sizes of the model that `settings` ask for: of local folders, published models known here, or the hub's."""
    if settings.pretrained:
        file = locate(settings.pretrained, weights=False) / "config.json"
        return MultimodalConfig.from_dict(read_json(file), file)
    vision = PUBLISHED_CLIP.get(settings.clip) or vision_config(settings.clip)
    vision = replace(vision, image_size=settings.image_size or vision.image_size)
    text = PUBLISHED_QWEN.get(settings.qwen) or text_config(settings.qwen)
    return MultimodalConfig(vision, text, settings.features)


def card(name: str) -> tuple[str, float | None]:
    """The kind of device that `name` is, and its bytes; None where they are unknown. `cuda:24GB` need not be here."""
    size = re.fullmatch(r"cuda:(\d+(?:\.\d+)?)GB", name, re.IGNORECASE)
    if size:
        return "cuda", float(size[1]) * 2**30
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        return "cuda", None
    device = choose_device(name)
    return device.type, torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def describe(config: ExperimentConfig) -> list[str]:
    """The lines of `--dry-run`."""
    kind, room = card(config.device)
    shape = architecture(config.model)
    data = plan_data(config, shape)
    lines = [*parameter_table(config, shape), *data.lines]
    for number, stage in enumerate(shown_stages(config), 1):
        memory = stage_memory(shape, config, stage, kind, data.size)
        length = data.size.length if data.size else config.data.max_length
        lines.append(
            f"stage {number}: {steps(stage, data)} of {stage.batch_size * stage.gradient_accumulation_steps} samples "
            f"({stage.batch_size} x {stage.gradient_accumulation_steps}); "
            f"about {memory.total / 1e9:.1f} GB at most, for rows of {length} tokens ({memory})"
        )
        if data.samples is not None and stage.epochs and data.samples < samples_of_step(stage):
            lines.append(f"  too little data for one step: {smaller_steps(config, number, data.samples)}")
        if room and stage.epochs:
            lines.append(f"  {fit(config, number, memory, shape, data, room)}")
    if kind == "cuda" and room is None:
        lines.append("no CUDA card is here; device=cuda:24GB says whether each stage fits one of 24 GB, and what would")
    return lines


def parameter_table(config: ExperimentConfig, shape: MultimodalConfig) -> list[str]:
    """The parameters of each part, and how many of them each stage trains."""
    with torch.device("meta"):
        model = MultimodalLLM(shape)
    prepare(model, uncompiled(config))
    columns = [[count_weights(part) for part in model.children()]]
    for stage in shown_stages(config):
        train_only_(model, trained_parts(stage))
        columns.append([count_parameters(part, only_trainable=True) for part in model.children()])
    names = [*(name for name, _ in model.named_children()), "total"]
    rows = zip(names, *([*column, sum(column)] for column in columns), strict=True)
    titles = [f"stage {number} trains" for number in range(1, len(columns))]
    head = f"{'':22}{'parameters':>14}" + "".join(f"{title:>16}" for title in titles)
    return [
        head,
        *(f"{name:22}{weights:>14,}" + "".join(f"{n:>16,}" for n in trained) for name, weights, *trained in rows),
    ]


def shown_stages(config: ExperimentConfig) -> tuple[StageConfig, ...]:
    """Stages 1 and 2, and stage 3 where it is on."""
    return config.stages() if config.training.stage3.epochs else config.stages()[:2]


def samples_of_step(stage: StageConfig) -> int:
    return stage.batch_size * stage.gradient_accumulation_steps


def steps(stage: StageConfig, data: DataPlan) -> str:
    if data.samples is None:
        return f"{stage.epochs} epochs, steps unknown,"
    return f"{stage.epochs} epochs, {stage.epochs * (data.samples // samples_of_step(stage))} steps"


def smaller_steps(config: ExperimentConfig, number: int, samples: int) -> str:
    """The settings with which `samples` make about STEPS_AN_EPOCH steps an epoch."""
    if not samples:
        return "no sample can be used"
    wanted = max(1, samples // STEPS_AN_EPOCH)
    size = min(config.stages()[number - 1].batch_size, wanted)
    values = zip(batch_names(config, number), (size, wanted // size), strict=True)
    return "set " + " ".join(f"{name}={value}" for name, value in values)


def fit(
    config: ExperimentConfig, number: int, memory: Memory, shape: MultimodalConfig, data: DataPlan, room: float
) -> str:
    """Whether the stage fits a card of `room` bytes and, where not, the first single change with which it does."""
    limit = USABLE * room
    card_size = f"a card of {room / 2**30:.3g} GB ({limit / 1e9:.1f} GB usable)"
    if memory.total <= limit:
        return f"fits {card_size}"

    def total(settings: dict[str, str]) -> float:
        changed = config.model_copy(deep=True)
        for name, value in settings.items():
            changed.set_text(name, value)
        return stage_memory(shape, changed, changed.stages()[number - 1], "cuda", data.size).total

    strongest: dict[str, str] = {}
    for family, effect in changes(config, number):  # settings of one kind, the last takes least
        sizes = {len(family) - 1: total(family[-1])}
        strongest |= family[-1]
        if sizes[len(family) - 1] > limit:
            continue
        for index, settings in enumerate(family):
            size = sizes.get(index) or total(settings)
            if size <= limit:
                return f"does not fit {card_size}; {written(settings)} does: {size / 1e9:.1f} GB ({effect})"
    size = total(strongest)
    verdict = "all of them together do" if size <= limit else "neither do all of them together"
    return f"does not fit {card_size}, nor with one change; {verdict}: {size / 1e9:.1f} GB with {written(strongest)}"


def written(settings: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())
