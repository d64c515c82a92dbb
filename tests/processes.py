"""Groups of processes as torchrun starts them, but cheap: torch is imported once, and each group is forked from here.

processes.py JOBS.json    a list of jobs, run one after the other; beside it JOB.RANK.txt (their output) and codes.json

A job: {"name", "processes", "do": "gradients" | "train" | "loading" | "kill", ...}, see `gradients`, `training` and
`kill_at_random_moments`, which takes its time from the job before it. One that is "in background" does not hold up the
jobs after it.
"""

import copy
import importlib
import json
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401 - once, not in every process that draws its curves
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mmllm.config.schema import LoraConfig
from mmllm.config.sources import load
from mmllm.data.batches import Batch, make_batch, read_rows
from mmllm.data.chat import IGNORED
from mmllm.data.samples import load_samples
from mmllm.errors import run
from mmllm.layers.lora import add_lora_
from mmllm.layers.quantized import quantize_
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.distributed import World, full
from mmllm.training.experiment import train
from mmllm.training.fsdp import is_sharded, shard_
from mmllm.training.prepare import checkpoint_blocks_, train_only_
from mmllm.training.step import accumulate_gradients, step_counts

PARENT = os.getpid()
FORGOTTEN_S = 300  # a group that is not done by then is killed, and its codes say so

# The gradient of one step ---------------------------------------------------------------------------------------------

PROJECTOR, BOTH = ("multi_modal_projector",), ("multi_modal_projector", "language_model")
WAYS = {  # of training: the parts that are trained
    "stage 1": PROJECTOR,
    "full": BOTH,
    "lora": BOTH,
    "int8": BOTH,
    "everything": (*BOTH, "vision_tower"),
}
KINDS = {way: ["replicated", "sharded"] for way in WAYS} | {
    "int8": ["replicated"],
    "full": ["replicated", "sharded", "sharded, recomputed"],
}
NUM_ROWS = 8


def model_for(start: MultimodalLLM, way: str) -> MultimodalLLM:
    model = copy.deepcopy(start)
    if way == "int8":
        quantize_(model.language_model)
    if way in ("lora", "int8"):
        add_lora_(model.language_model, LoraConfig(r=4, lora_dropout=0.0))
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.data.fill_(0.02)
    train_only_(model, WAYS[way])
    return model


def rows_of(folder: Path, model: MultimodalLLM) -> list[Batch]:
    """Rows of different lengths; the last four of eight have no target, and the last two no image either."""
    samples = load_samples(folder / "train.json", folder / "images")[:NUM_ROWS]
    rows = [make_batch([read_rows(sample, model.processor)[0]], model.processor) for sample in samples]
    for i, row in enumerate(rows):
        if i >= 4:
            row.labels_BT.fill_(IGNORED)
        if i >= 6:
            text = row.ids_BT[row.ids_BT != model.config.image_token_id][None]
            rows[i] = Batch(text, torch.full_like(text, IGNORED), row.pixels_N3SS[:0])
    return rows


def joined(rows: list[Batch], pad_id: int) -> Batch:
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([row.ids_BT[0] for row in rows], batch_first=True, padding_value=pad_id)
    labels = pad([row.labels_BT[0] for row in rows], batch_first=True, padding_value=IGNORED)
    return Batch(ids, labels, torch.cat([row.pixels_N3SS for row in rows]))


def step_gradient(model: MultimodalLLM, rows: list[Batch], micro_batches: int, world: World) -> dict[str, torch.Tensor]:
    """The gradient of all processes and their loss; each takes its share of the rows, in so many micro-batches."""
    share = NUM_ROWS // world.size
    own = rows[world.rank * share : (world.rank + 1) * share]
    size = share // micro_batches
    batches = [joined(own[i : i + size], model.processor.tokenizer.pad_id) for i in range(0, share, size)]
    targets = world.sum(step_counts(batches))[0]
    loss = accumulate_gradients(model, batches, targets=targets)
    world.sum_([loss])
    if not is_sharded(model):
        world.sum_gradients_(model.parameters())
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss}


def gradients(world_folder: str, out: str, micro_batches: list[int]) -> None:
    """For every way of training, in float64, replicated and sharded: OUT holds the tensors "WAY|KIND|MICRO|NAME"."""
    folder, found = Path(world_folder), {}
    with World.start("cpu") as world:
        cases = [(way, kind) for way in WAYS for kind in KINDS[way] if world.size > 1 or kind == "replicated"]
        start = MultimodalLLM.from_towers(folder / "clip", folder / "qwen")
        rows = rows_of(folder, start)
        torch.set_default_dtype(torch.float64)  # of the weights that `shard_` makes
        for way, kind in cases:
            model = model_for(start, way).double()
            if kind == "sharded, recomputed":
                checkpoint_blocks_(model.language_model.model.layers)
            if kind != "replicated":
                shard_(model, world, reshard_after_forward=kind == "sharded, recomputed")
            for number in micro_batches:
                result = step_gradient(model, rows, number, world)
                found |= {f"{way}|{kind}|{number}|{name}": value.clone() for name, value in result.items()}
                model.zero_grad()
        if world.is_first:
            save_file(found, out)


# A run with a fault in one of its processes ---------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    while True:
        time.sleep(3600)


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


FAULTS: dict[str, Callable[[], None]] = {"die": die, "hang": hang, "ask to stop": ask_to_stop, "fill disk": fill_disk}


def training(config: str, resume: str | None = None, fault: list | None = None) -> int:
    """train.py's work. `fault`: [which, of which process, in which optimiser step]."""
    if fault and os.environ["RANK"] == str(fault[1]):
        steps, step = iter(range(1, 1000)), torch.optim.AdamW.step

        def faulty_step(self: torch.optim.AdamW) -> None:
            if next(steps) == fault[2]:
                FAULTS[fault[0]]()
            step(self)

        torch.optim.AdamW.step = faulty_step
    return train(load(config), resume=resume)


def loading(fault: list) -> None:
    """One process dies while the others load a model, which is no collective."""
    with World.start("cpu") as world:
        FAULTS["die" if world.rank == fault[1] else "hang"]()


# The groups -----------------------------------------------------------------------------------------------------------


def start_store() -> int:
    """Fork a process with the store in which a group meets, as torchrun holds one; returns its port.

    Its threads must not be in this process: a fork that happens while one of them holds a lock would hang.
    """
    reader, writer = os.pipe()
    if os.fork() == 0:
        signal.alarm(FORGOTTEN_S)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writer, str(store.port).encode())
        while os.getppid() == PARENT:  # the store lives as long as the groups may
            time.sleep(0.1)
        os._exit(0)
    return int(os.read(reader, 16))


def start_group(processes: int, work: Callable[[], int | None], said: Path) -> list[int]:
    """Forks the processes of a group; each writes its output to SAID.RANK.txt. Returns their numbers."""
    port = start_store() if processes > 1 else 0
    started = []
    for rank in range(processes):
        number = os.fork()
        if number == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            output = os.open(f"{said}.{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            signal.alarm(FORGOTTEN_S)
            code: int | str | None = 70
            try:
                run(work)
            except SystemExit as end:
                code = end.code
            finally:  # also after a bug, whose traceback is printed: never into the loop of the parent
                if code == 70:
                    traceback.print_exc()
                sys.stdout.flush()
                os._exit(code)
        started.append(number)
    return started


def codes_of(group: list[int], hanging: int | None = None) -> list[int]:
    """The exit codes of a group, in the order of the ranks; the one that hangs is killed when the others have ended."""
    codes = {}
    for rank, number in sorted(enumerate(group), key=lambda item: item[0] == hanging):
        if rank == hanging:
            os.kill(number, signal.SIGKILL)
        codes[rank] = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    return [codes[rank] for rank in range(len(group))]


def end_the_others(group: list[int], victim: int) -> None:
    """Ask the others to end when process `victim` has died, as torchrun does; late enough for them to have noticed."""
    os.waitid(os.P_PID, group[victim], os.WEXITED | os.WNOWAIT)
    time.sleep(1)
    for rank, number in enumerate(group):
        if rank != victim:
            os.kill(number, signal.SIGTERM)


def kill_at_random_moments(config: str, times: int, seed: int, whole_s: float, said: Path) -> list[int]:
    """Starts a run, kills it, goes on with it, until it was killed so many times; each time it comes to its end what it
    left is put aside as NAME-1, NAME-2, ..., and it begins anew. Returns the codes of those ends.

    A kill comes after a random part of `whole_s`, the time of an uninterrupted run.
    """
    rng, killed, ends = random.Random(seed), 0, []
    directory = Path(json.loads(Path(config).read_text())["output_dir"]) / "tiny"
    while killed < times or directory.exists():
        [number] = start_group(1, partial(training, config, resume="auto"), said)
        patience_s = rng.uniform(0.1, 0.9) * whole_s if killed < times else None
        with os.fdopen(os.pidfd_open(number)) as watched:
            has_ended = select.select([watched], [], [], patience_s)[0]
        if not has_ended:
            os.kill(number, signal.SIGKILL)
            killed += 1
        code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        if code != -signal.SIGKILL:
            ends.append(code)
            directory.rename(directory.with_name(f"tiny-{len(ends)}"))
    return ends


def main() -> None:
    jobs = Path(sys.argv[1])
    torch.set_num_threads(1)
    codes, background, took_s = {}, {}, 0.0
    todo = json.loads(jobs.read_text())
    if any(job["processes"] > 1 for job in todo):
        importlib.import_module("torch._dynamo")  # FSDP does, for seconds: once, not in every process
    for job in todo:
        name, processes, do = (job.pop(key) for key in ("name", "processes", "do"))
        in_background = job.pop("in_background", False)
        begin = time.monotonic()
        if do == "kill":
            codes[name] = kill_at_random_moments(**job, whole_s=took_s, said=jobs.parent / name)
            continue
        work = partial({"gradients": gradients, "train": training, "loading": loading}[do], **job)
        which, of, _ = job.get("fault") or (None, None, None)
        group, hanging = start_group(processes, work, jobs.parent / name), of if which == "hang" else None
        if which == "die":
            end_the_others(group, of)
        if in_background:
            background[name] = group, hanging
        else:
            codes[name] = codes_of(group, hanging)
        took_s = time.monotonic() - begin
    codes |= {name: codes_of(*group) for name, group in background.items()}
    (jobs.parent / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
