"""Answers to an image and 32 words, ours beside `transformers` and llama.cpp on the same weights.

A token costs what it costs to read its 494 million weights, and little else. So tokens per second stand beside the share of
the machine's read bandwidth that they amount to. The bandwidth is that of the fastest of many reads, some in every round.

A prompt is an image (49 tokens) and 32 tokens of text; 128 tokens are generated greedily. llama.cpp reads only text: its
prompt has as many tokens, and no image to encode.
"""

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from benchmarks import llama_cpp_peer as llama
from benchmarks import transformers_peer as peers
from benchmarks.random_model import image, prompt_ids, sizes, write_model
from benchmarks.rows import Goal
from benchmarks.runner import Work, compete, speeds
from mmllm.errors import RunError
from mmllm.inference.engine import Engine
from mmllm.inference.optimize import make_packed_
from mmllm.inference.pipeline import load_pipeline
from mmllm.inference.request import GenerationConfig, Handle, Prompt
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.console import print_rank0
from mmllm.runtime.device import choose_device
from mmllm.runtime.memory import peak_memory

CAPTION_TOKENS = 20
PRECISIONS_OF = {"cpu": ("bfloat16", "int8", "int8-dynamic", "int4"), "cuda": ("bfloat16", "int8")}
BATCHES = {"cpu": (1, 4, 8, 16), "cuda": (1, 16, 64)}
WARM_TOKENS = 4  # before each turn, not measured
READ, READ_S = "memory read", 1.0  # seconds of reading in a turn
SAMPLE = Path(__file__).parent.parent / "sample.py"


def ours(precision: str) -> str:
    return f"mmllm {precision}"


def batch(rows: int) -> str:
    return f"batch {rows}"


B1, CAPTION, COLD = batch(1), f"caption of {CAPTION_TOKENS} tokens", f"sample.py, {CAPTION_TOKENS} tokens"
LLAMA, LLAMA4, HF = "llama.cpp Q8_0", "llama.cpp Q4_0", "transformers bfloat16"


def goal(device: str, text: str, field: str, row: tuple[str, str], bound: float, **more) -> Goal:
    return Goal("generate", device, text, field, row, bound, **more)


RATE, FIRST = "tokens_per_s", "first_token_s"
INT8, INT4, BF16, DYN = ours("int8"), ours("int4"), ours("bfloat16"), "int8-dynamic"
AT_LOAD = f"{INT8}, packed at load"
GOALS = (
    goal("cpu", f"int8, tokens/s against {LLAMA}", RATE, (B1, INT8), 1.3, over=(B1, LLAMA)),
    goal("cpu", "int8, share of the bandwidth", "bandwidth_share", (B1, INT8), 0.92),
    goal("cpu", f"int4, tokens/s against {LLAMA4}", RATE, (B1, INT4), 1.0, over=(B1, LLAMA4)),
    goal("cpu", f"int8, tokens/s against {HF}", RATE, (B1, INT8), 5.0, over=(B1, HF)),
    goal("cpu", f"bfloat16, tokens/s against {HF}", RATE, (B1, BF16), 3.0, over=(B1, HF)),
    goal("cpu", f"int8, first token against {LLAMA}", FIRST, (B1, INT8), 0.65, over=(B1, LLAMA), at_most=True),
    goal("cpu", f"{DYN}, first token against {LLAMA}", FIRST, (B1, ours(DYN)), 0.4, over=(B1, LLAMA), at_most=True),
    goal("cpu", "int8, batch 4 against batch 1", RATE, (batch(4), INT8), 3.4, over=(B1, INT8)),
    goal("cpu", "int8, batch 8 against batch 1", RATE, (batch(8), INT8), 5.0, over=(B1, INT8)),
    goal("cpu", f"int8, {CAPTION}, s", "total_s", (CAPTION, INT8), 1.0, at_most=True),
    goal("cpu", f"int8, {COLD} from a cold start, s", "total_s", (COLD, INT8), 3.5, at_most=True),
    goal("cpu", "int8 from float weights, load, s", "load_s", (CAPTION, AT_LOAD), 3.0, at_most=True),
    goal("cpu", "int8, peak memory, bytes", "peak_bytes", (B1, INT8), 1e9, at_most=True),
    goal("cuda", "bfloat16, tokens/s", RATE, (B1, BF16), 1000),
    goal("cuda", "int8, tokens/s", RATE, (B1, INT8), 1300),
    goal("cuda", f"bfloat16, tokens/s against {HF}", RATE, (B1, BF16), 5.0, over=(B1, HF)),
    goal("cuda", "bfloat16, tokens/s of 64 slots", RATE, (batch(64), BF16), 20000),
    goal("cuda", "bfloat16, first token, s", FIRST, (B1, BF16), 0.015, at_most=True),
)


def measure(spec: dict, precisions: list[str], batches: list[int], rounds: int, folder: Path) -> Iterator[list[dict]]:
    """The rows of all contestants, those of the slowest to get ready at the end.

    `folder` keeps the model of random weights from one benchmark to the next.
    """
    config = sizes(spec["size"], spec["layers"])
    name = f"{spec['size']}-{spec['layers'] or 'all'}-layers"
    spec = spec | {"bench": "generate", "model": str(write_model(folder / name / "model", config))}
    turns = [{"case": batch(rows), "rows": rows, "new_tokens": spec["new_tokens"]} for rows in batches]
    specs = [spec | {"contestant": READ, "kind": "read", "turns": [{"case": READ}]}]
    packed, on_cpu = {}, spec["device"] == "cpu"  # int4 is loaded from int4, int8-dynamic from int8
    for precision in precisions:
        if on_cpu and (stored := precision.removesuffix("-dynamic")) in ("int8", "int4"):
            packed[precision] = {"model": str(packed_model(Path(spec["model"]), stored))}
    for precision in precisions:
        caption = {"case": CAPTION, "rows": 1, "new_tokens": CAPTION_TOKENS}
        mine = spec | {"contestant": ours(precision), "kind": "ours", "precision": precision}
        mine |= packed.get(precision, {})
        specs.append(mine | {"turns": [*turns, caption]})
        if precision == "int8" and on_cpu:
            specs.append(mine | {"contestant": AT_LOAD, "model": spec["model"], "turns": [caption]})
    yield with_shares(compete(specs + peer_specs(spec, turns), rounds))
    if on_cpu:
        yield with_shares([cold_start(spec | {"precision": each} | packed.get(each, {})) for each in precisions])
    if peers.has_transformers() and (not on_cpu or spec["size"] == "tiny"):
        theirs = spec | {"kind": "transformers", "precision": "bfloat16", "compiled": True, "turns": turns[:1]}
        few = [each for each in specs if each["contestant"] in (READ, BF16)]
        yield with_shares(compete([*few, theirs | {"contestant": f"{HF} compiled"}], rounds))


def with_shares(rows: list[dict]) -> list[dict]:
    """The rows with their shares of the bandwidth, which it prints."""
    bandwidth = [row["bytes_per_s"] for row in rows if row["contestant"] == READ]
    for row in rows:
        if "steps_per_s" in row:
            row["bandwidth_share"] = row["steps_per_s"] * row["weight_bytes"] / bandwidth[0]
        print_rank0("  " + console_line(row))
    return rows


def packed_model(source: Path, precision: str) -> Path:
    """The model in int8 or int4 on disk, as `convert_weights.py --int8` writes it; kept when it is there already."""
    folder = source.with_name(f"{source.name}-{precision}")
    if not folder.is_dir():
        model = MultimodalLLM.from_pretrained(source, dtype=None)
        make_packed_(model, precision)
        model.save_pretrained(folder)
    return folder


def peer_specs(spec: dict, turns: list[dict]) -> list[dict]:
    """The other programs that are installed here; on a CPU they answer one at a time."""
    alone = [turn for turn in turns if turn["rows"] == 1]
    specs = []
    if peers.has_transformers():
        theirs = spec | {"kind": "transformers", "precision": "bfloat16", "turns": alone}
        all_turns = turns if spec["device"] == "cuda" else alone
        specs.append(theirs | {"contestant": HF, "compiled": False, "turns": all_turns})
    if llama.is_installed():
        for kind in llama.KINDS:
            llama.write_gguf(Path(spec["model"]), kind)  # here, so that it counts to no contestant's peak
            specs.append(
                spec | {"kind": "llama.cpp", "contestant": f"llama.cpp {kind}", "precision": kind, "turns": alone}
            )
    return [spec for spec in specs if spec["turns"]]


def console_line(row: dict) -> str:
    """The console line of a row."""
    parts = [f"{row['contestant']}, {row['case']}:"]
    for name, text, scale in (
        ("tokens_per_s", "{:.1f} tokens/s", 1),
        ("bandwidth_share", "{:.0f} % of the bandwidth", 100),
        ("first_token_s", "first after {:.3f} s", 1),
        ("total_s", "{:.2f} s in all", 1),
        ("load_s", "loaded in {:.1f} s", 1),
        ("bytes_per_s", "{:.1f} GB/s", 1e-9),
        ("peak_bytes", "{:.2f} GB at most", 1e-9),
    ):
        if name in row:
            parts.append(text.format(row[name] * scale))
    return parts[0] + " " + ", ".join(parts[1:])


# The contestants, each in its process ---------------------------------------------------------------------------------


def build(spec: dict) -> tuple[dict, Work]:
    kinds = {"read": read_memory, "ours": own_answers, "transformers": peers.answers, "llama.cpp": llama.answers}
    loaded, work = kinds[spec["kind"]](spec)
    if spec["kind"] == "read":
        return loaded, work

    def turn(asked: dict) -> dict:
        # after a minute of waiting the weights are no longer in the caches: a few tokens first
        work({"case": B1, "rows": 1, "new_tokens": WARM_TOKENS})
        return work(asked)

    return loaded, turn


def read_memory(spec: dict) -> tuple[dict, Work]:
    """The machine's read bandwidth: the fastest sum of a gigabyte of float32, or maximum of it as int8."""
    device = choose_device(spec["device"])
    numbers = torch.ones(2**28 if spec["size"] == "full" else 2**16, device=device)

    def turn(asked: dict) -> dict:
        end, best = time.perf_counter() + (READ_S if spec["size"] == "full" else 0), math.inf
        while True:
            for read in (numbers.sum, numbers.view(torch.int8).amax):
                begin = time.perf_counter()
                read().item()
                best = min(best, time.perf_counter() - begin)
            if time.perf_counter() > end:
                return {"bytes_per_s": numbers.nbytes / best}

    return {}, turn


def own_answers(spec: dict) -> tuple[dict, Work]:
    """The engine of sample.py, the evaluation and the server."""
    begin = time.perf_counter()
    pipeline = load_pipeline(spec["model"], device=spec["device"], dtype=spec["precision"])
    load_s = time.perf_counter() - begin
    model, peaks, engines = pipeline.model, {}, {}

    def turn(asked: dict) -> dict:
        prompts = [Prompt(tuple(prompt_ids(spec, row)), image(spec, row)) for row in range(asked["rows"])]
        config = GenerationConfig(max_new_tokens=asked["new_tokens"])
        rows, longest = asked["rows"], len(prompts[0].ids) + asked["new_tokens"]
        if asked["case"] not in engines:  # kept: it may hold CUDA graphs
            engines[asked["case"]] = Engine(model, rows, max_length=longest, is_exact=False)
        engine, token_times = engines[asked["case"]], []

        def on_token(row: int, token: int) -> None:
            token_times.append((row, time.perf_counter()))

        begin = time.perf_counter()
        handles = [Handle(prompt, config, on_token=partial(on_token, row)) for row, prompt in enumerate(prompts)]
        engine.run([engine.submit(handle) for handle in handles])
        total = time.perf_counter() - begin
        answers = [handle.result() for handle in handles]
        if any(len(answer.ids) != asked["new_tokens"] for answer in answers):
            raise RunError(
                f"an answer ended before its {asked['new_tokens']} tokens; measure with other random weights"
            )
        peak = peaks.setdefault(asked["case"], peak_memory(model.device))  # batches grow, and so does the peak
        return speeds(token_times, begin, total, asked["rows"]) | {"peak_bytes": peak}

    return {"load_s": load_s, "weight_bytes": weight_bytes(model.language_model)}, turn


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of all weights that a token reads: everything but an embedding that is not the head too."""
    tensors = {t.data_ptr(): t for t in [*module.parameters(), *module.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def cold_start(spec: dict) -> dict:
    """The row of sample.py as a user starts it: import, load, read the image, answer. The second of two starts counts."""
    image = Path(spec["model"]).parent / "image.jpg"
    Image.effect_noise((640, 480), 64).convert("RGB").save(image)
    command = [sys.executable, str(SAMPLE), "--image", str(image), "--model", spec["model"]]
    command += ["--dtype", spec["precision"], "--device", spec["device"], "--max-new-tokens", str(CAPTION_TOKENS)]
    for _ in range(2):
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {"case": COLD, "contestant": ours(spec["precision"]), "total_s": time.perf_counter() - begin, "turns": 1}
