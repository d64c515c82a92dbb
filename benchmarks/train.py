"""One optimizer step, ours against the same step built from `transformers` and `peft`.

Both compute the same loss from the same weights. Most of the difference is one line: the other side computes logits of
every position, 8 x 128 x 151,936 numbers several times over, where 40 of 128 tokens are targets.

A step is 8 rows of 128 tokens, 49 of them an image's and 40 targets, in bfloat16 autocast: images through the tower,
forward, backward, clipping, AdamW. Each program holds frozen weights in the precision of its own rules.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import transformers_peer as peers
from benchmarks.random_model import random_model, sizes
from benchmarks.rows import Goal
from benchmarks.runner import Work, compete
from mmllm.config.schema import ExperimentConfig, StageConfig
from mmllm.data.batches import Batch, collate
from mmllm.data.chat import IGNORED, Encoded
from mmllm.data.packing import pack
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.console import print_rank0
from mmllm.runtime.device import choose_device
from mmllm.runtime.distributed import World
from mmllm.runtime.memory import keep_freed_memory, peak_memory
from mmllm.training.prepare import cast_, frozen_weights, prepare, train_only_, trained_parts
from mmllm.training.stage import stage_groups
from mmllm.training.step import adamw, peak_flops, step_counts, step_flops, update_

TOKENS, TARGETS = 128, 40
RATE = 1e-5
PREFIX, CAPTION, CAPTIONS = 70, 12, 5  # of an image with several captions: tokens before them, of each, and how many
SHORTEST, LONGEST, MICRO_BATCHES = 112, 256, 2  # of rows of many lengths: tokens, and micro-batches of the step
OURS, PEER = "mmllm", "transformers + peft"
# mmllm without what makes a step cheaper, or with an option
APART, UNSORTED = "mmllm, a row each", "mmllm, as they come"
EIGHT_BIT, COMPILED = "mmllm, 8-bit AdamW", "mmllm, compiled blocks"


@dataclass(frozen=True)
class Case:
    """A step: its stage, its settings, and who else takes the same step, with which settings changed."""

    name: str
    stage: int
    settings: tuple[str, ...] = ()
    others: dict[str, tuple[str, ...]] = field(default_factory=lambda: {PEER: ()})
    is_large: bool = False  # two processes of it are too much for a small machine's memory


FIVE = "stage 1, five captions per image"
LENGTHS = f"stage 1, rows of {SHORTEST} to {LONGEST} tokens by length"
FULL = {PEER: (), EIGHT_BIT: ("training.optimizer=adamw8bit",), COMPILED: ("training.compile=true",)}
CASES = (
    Case("stage 1", 1),
    Case("stage 2, full", 2, others=FULL, is_large=True),
    Case("stage 2, LoRA", 2, ("model.use_lora=true",)),
    Case("stage 2, LoRA on int8", 2, ("model.use_lora=true", "model.load_in_8bit=true"), others={}),
    Case(FIVE, 1, others={APART: ("data.share_images=false",)}),
    Case(LENGTHS, 1, ("data.group_by_length=true",), {UNSORTED: ("data.group_by_length=false",)}),
)
BY_NAME = {case.name: case for case in CASES}

BIT8, PEER_FULL = ("stage 2, full", EIGHT_BIT), ("stage 2, full", PEER)
GOALS = (
    *(
        Goal("train", device, f"{case}: speed against {PEER}", "steps_per_s", (case, OURS), bound, (case, PEER))
        for device, bounds in (("cpu", (1.8, 1.3, 1.3)), ("cuda", (2.0, 2.0, 2.0)))
        for case, bound in zip(("stage 1", "stage 2, full", "stage 2, LoRA"), bounds, strict=True)
    ),
    *(
        Goal("train", "cpu", f"{case}: peak memory against {PEER}", "peak_bytes", (case, OURS), 0.7, (case, PEER), True)
        for case in ("stage 1", "stage 2, full", "stage 2, LoRA")
    ),
    Goal("train", "cpu", f"stage 2, full: speed of {EIGHT_BIT} against {PEER}", "steps_per_s", BIT8, 1.0, PEER_FULL),
    Goal(
        "train", "cpu", f"stage 2, full: peak of {EIGHT_BIT} against {PEER}", "peak_bytes", BIT8, 0.75, PEER_FULL, True
    ),
    *(
        Goal("train", device, f"{FIVE}: one row against a row each", "steps_per_s", (FIVE, OURS), 3.0, (FIVE, APART))
        for device in ("cpu", "cuda")
    ),
    Goal(
        "train",
        "cuda",
        f"stage 2, full: share of the peak FLOP/s of {COMPILED}",
        "mfu",
        ("stage 2, full", COMPILED),
        0.4,
    ),
)


def measure(names: list[str], spec: dict, rounds: int) -> Iterator[list[dict]]:
    """The rows of each of the cases called `names`; `spec` says size, layers, rows of a step, and device."""
    for case in (BY_NAME[name] for name in names):
        print_rank0(f"{case.name}:")
        together = not case.is_large or spec["device"] != "cpu" or spec["size"] != "full"
        specs = [one | {"turns": [{"case": case.name}]} for one in contestants(case, spec)]
        found = compete(specs, rounds, together=together)
        for row in found:
            print_rank0(
                f"  {row['contestant']}: {row['seconds']:.2f} s a step, {row['tokens_per_s']:.0f} tokens/s, "
                f"{row['peak_bytes'] / 1e9:.2f} GB at most, loss {row['loss']:.4f}"
            )
        yield found


def contestants(case: Case, spec: dict) -> list[dict]:
    """The specs of all contestants in `case` that are installed here; compiled blocks are measured on a GPU alone."""
    absent = {PEER: not peers.has_transformers(), COMPILED: spec["device"] != "cuda"}
    names = [OURS, *(name for name in case.others if not absent.get(name))]
    spec = spec | {"bench": "train", "case": case.name}
    return [spec | {"contestant": name, "settings": list(case.others.get(name, ()))} for name in names]


def build(spec: dict) -> tuple[dict, Work]:
    """The contestant of `spec`, which takes one step a turn."""
    begin = time.perf_counter()
    step = peer_step(spec) if spec["contestant"] == PEER else own_step(spec)
    device = choose_device(spec["device"])
    counts = step_counts(batches_of(spec))
    forget_peak(device)  # of loading

    def timed_step() -> tuple[float, float]:
        begin = time.perf_counter()
        loss = step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin, loss

    def turn(asked: dict) -> dict:
        if device.type == "cuda":  # the cache was emptied after the last turn, so the last of four steps counts
            *_, (seconds, loss) = [timed_step() for _ in range(4)]
            torch.cuda.empty_cache()  # several programs share its memory
        else:
            seconds, loss = timed_step()
        flops = flops_of(spec, counts) / seconds
        peak = peak_flops(device)
        return {
            "seconds": seconds,
            "steps_per_s": 1 / seconds,
            "tokens_per_s": counts[1] / seconds,
            "images_per_s": counts[2] / seconds,
            "tflops_per_s": flops / 1e12,
            "mfu": flops / peak if peak else None,
            "peak_bytes": peak_memory(device),
            "loss": loss,
        }

    return {"rows": spec["rows"], "load_s": time.perf_counter() - begin}, turn


def forget_peak(device: torch.device) -> None:
    """Starts `peak_memory` anew at what is in use now, where the system can: on a GPU and on Linux."""
    status = Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif status.exists():
        status.write_text("5")


def configuration(spec: dict) -> ExperimentConfig:
    config = ExperimentConfig()
    config.device = spec["device"]
    config.data.batch_size = spec["rows"]
    config.training.bf16 = spec["bf16"]
    for setting in (*BY_NAME[spec["case"]].settings, *spec.get("settings", ())):
        name, _, text = setting.partition("=")
        config.set_text(name, text)
    return config


def batches_of(spec: dict) -> list[Batch]:
    """The micro-batches of the contestant's step."""
    data = configuration(spec).data
    if spec["case"] == FIVE:
        return [captions_batch(spec, data.share_images)]
    if spec["case"] == LENGTHS:
        return batches_of_lengths(spec, data.group_by_length)
    batch = synthetic_batch(spec)
    return [batch.pinned() if spec["device"] == "cuda" else batch]  # as the trainer's loader makes it


def captions_batch(spec: dict, share_images: bool) -> Batch:
    """Half as many images, five captions each: a row for an image, or a row for a caption."""
    shape = sizes(spec["size"], spec["layers"])
    rng, positions = torch.Generator().manual_seed(0), shape.num_image_tokens
    rows, pixels = [], []
    for _ in range(max(1, spec["rows"] // 2)):
        image = torch.randn(3, shape.vision.image_size, shape.vision.image_size, generator=rng)
        words = torch.randint(1, shape.image_token_id - 12, (PREFIX + CAPTIONS * CAPTION,), generator=rng).tolist()
        start = [*words[:4], *[shape.image_token_id] * positions, *words[4 : PREFIX - positions]]
        captions = [words[PREFIX + i * CAPTION :][:CAPTION] for i in range(CAPTIONS)]
        texts = [Encoded(start + caption, [IGNORED] * len(start) + caption, [0]) for caption in captions]
        mine = pack(texts, shape.image_token_id) if share_images else texts
        rows += mine
        pixels += [image] * len(mine)
    return collate(rows, pixels, 0, shape.vision.image_size)


def batches_of_lengths(spec: dict, group_by_length: bool) -> list[Batch]:
    """A step of MICRO_BATCHES micro-batches of rows of many lengths, each padded to its longest."""
    whole = synthetic_batch(spec | {"rows": spec["rows"] * MICRO_BATCHES}, LONGEST)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (len(whole.ids_BT),), generator=torch.Generator().manual_seed(1))
    batches = []
    for rows in (lengths.argsort() if group_by_length else torch.arange(len(lengths))).split(spec["rows"]):
        ids_BT = whole.ids_BT[rows, : int(lengths[rows].max())]
        after = torch.arange(ids_BT.shape[1]) - lengths[rows, None]  # -1: the row's last token
        labels_BT = ids_BT.masked_fill((after < -TARGETS) | (after >= 0), IGNORED)
        batches.append(Batch(ids_BT, labels_BT, whole.pixels_N3SS[rows]))
    return batches


def synthetic_batch(spec: dict, length: int = TOKENS) -> Batch:
    """The rows of a step: a few words, the positions of an image, a question, and an answer that is the target."""
    architecture = sizes(spec["size"], spec["layers"])
    rng = torch.Generator().manual_seed(0)
    rows, side, positions = spec["rows"], architecture.vision.image_size, architecture.num_image_tokens
    ids_BT = torch.randint(0, architecture.image_token_id - 12, (rows, length), generator=rng)
    ids_BT[:, 16 : 16 + positions] = architecture.image_token_id
    labels_BT = torch.full_like(ids_BT, IGNORED)
    labels_BT[:, -TARGETS:] = ids_BT[:, -TARGETS:]
    return Batch(ids_BT, labels_BT, torch.randn(rows, 3, side, side, generator=rng))


def own_step(spec: dict) -> Callable[[], float]:
    """Our optimizer step, as training takes it."""
    config = configuration(spec)
    return steps_of(spec, config, *own_model(spec, config))


def own_model(spec: dict, config: ExperimentConfig) -> tuple[MultimodalLLM, StageConfig]:
    """The model of random weights, ready for the stage of the case."""
    stage = config.stages()[BY_NAME[spec["case"]].stage - 1]
    model = random_model(sizes(spec["size"], spec["layers"]), choose_device(spec["device"]))
    prepare(model, config)
    train_only_(model, trained_parts(stage))
    if config.training.bf16:
        cast_(frozen_weights(model), torch.bfloat16)
    keep_freed_memory(model.device)
    return model, stage


def steps_of(spec: dict, config: ExperimentConfig, model: MultimodalLLM, stage: StageConfig) -> Callable[[], float]:
    optimizer = adamw(stage_groups(model, stage, 0.0), 0.9, 0.95, config.training.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = spec.get("rate", RATE)
    batches, world = batches_of(spec), World(choose_device(spec["device"]))
    targets = step_counts(batches)[0]
    return lambda: update_(model, optimizer, batches, config.training, targets, world)[0]


def peer_step(spec: dict) -> Callable[[], float]:
    """The same step of `transformers`, with `peft` where there are adapters."""
    case, config = BY_NAME[spec["case"]], configuration(spec)
    trained = config.stages()[case.stage - 1].train
    lora = config.model.lora_config if config.model.use_lora else None
    architecture = sizes(spec["size"], spec["layers"])
    return peers.training_step(
        architecture, synthetic_batch(spec), trained, lora, spec["device"], bf16=spec["bf16"], rate=RATE
    )


def flops_of(spec: dict, counts: tuple[int, int, int]) -> float:
    """Operations that the step needs, whoever takes it: unnecessary ones do not count."""
    config = configuration(spec)
    with torch.device("meta"):
        model = MultimodalLLM(sizes(spec["size"], spec["layers"]))
    prepare(model, config)
    stage = config.stages()[BY_NAME[spec["case"]].stage - 1]
    train_only_(model, trained_parts(stage))
    return step_flops(model, counts[1], counts[0], counts[2])
