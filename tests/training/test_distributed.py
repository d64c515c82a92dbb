"""Several processes on one machine: the same gradient, the same run, one voice, one end.

The groups of processes are started by tests/processes.py, many in one launch.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from conftest import ROOT
from mmllm.config.schema import ExperimentConfig, RewardConfig, StageConfig
from mmllm.data.order import sample_order
from mmllm.errors import UserError
from mmllm.models.multimodal import MultimodalLLM
from mmllm.reporting.metrics import read_metrics
from mmllm.runtime.distributed import ALONE, World, local, row_range
from mmllm.storage import checkpoint as disk
from mmllm.training.experiment import train
from mmllm.training.fsdp import is_wanted, shard_
from mmllm.training.step import accumulate_gradients
from processes import KINDS, WAYS, model_for
from tiny_run import break_image, poison, write_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a launch runs many groups
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@dataclass(frozen=True)
class Done:
    """What a launch of groups left."""

    folder: Path
    codes: dict[str, list[int]]

    def said(self, name: str, rank: int) -> str:
        return (self.folder / f"{name}.{rank}.txt").read_text()

    def all_said(self, name: str) -> str:
        return "".join(self.said(name, rank) for rank in range(len(self.codes[name])))


def launch(folder: Path, jobs: list[dict]) -> Done:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(ROOT / "tests" / "processes.py"), str(folder / "jobs.json")]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Done(folder, json.loads((folder / "codes.json").read_text()))


# One gradient


@pytest.fixture(scope="module")
def gradients(world, tmp_path_factory):
    """For (processes, micro-batches): tensors by "way|kind|name"."""
    folder = tmp_path_factory.mktemp("gradients")
    splits = {1: [1, 4], 2: [1, 2]}
    jobs = [
        {"name": f"{n}", "processes": n, "do": "gradients", "world_folder": str(world.folder), "micro_batches": numbers}
        for n, numbers in splits.items()
    ]
    done = launch(folder, [job | {"out": str(folder / f"{job['name']}.safetensors")} for job in jobs])
    assert done.codes == {"1": [0], "2": [0] * 2}, done.all_said("1")
    found = {}
    for n, numbers in splits.items():
        tensors = load_file(folder / f"{n}.safetensors")
        for number in numbers:
            found[n, number] = {
                "|".join((way, kind, name)): value
                for (way, kind, micro, name), value in ((key.split("|"), v) for key, v in tensors.items())
                if micro == str(number)
            }
    return found


@pytest.mark.parametrize("split", [(1, 4), (2, 1), (2, 2)], ids="{0[0]} x {0[1]}".format)
@pytest.mark.parametrize("way", WAYS)
def test_any_split_into_processes_and_micro_batches_gives_the_same_gradient(gradients, way, split):
    """Eight rows of different lengths: the last four have no target, the last two no image either."""
    kinds = KINDS[way] if split[0] > 1 else ["replicated"]
    whole, found = gradients[1, 1], gradients[split]
    wanted = {name: value for name, value in whole.items() if name.startswith(f"{way}|")}
    size = sum(value.square().sum() for name, value in wanted.items() if not name.endswith("|loss")).sqrt()
    assert size > 1
    for kind in kinds:
        for name, value in wanted.items():
            got = found[name.replace("|replicated|", f"|{kind}|")]
            allowed = 1e-6 if name.endswith("|loss") else 1e-12  # a loss is added up in float32
            least = 1e-3 * size  # the gradient of a key's bias is nothing but rounding
            assert (got - value).norm() <= allowed * max(value.norm(), least), (kind, name)


def test_one_process_adds_nothing(world):
    start = MultimodalLLM.from_towers(world.folder / "clip", world.folder / "qwen")
    model = model_for(start, "stage 1")
    assert ALONE.sum([3, 4]) == [3, 4] and ALONE.all_reduce_max([15, 2]) == [15, 2]
    assert ALONE.on_rank0(lambda: "x") == "x" and ALONE.all_gather("y") == ["y"]
    ALONE.sum_gradients_(model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert accumulate_gradients(model, [], targets=5) == 0


# Where the weights lie


@pytest.mark.parametrize("rows, ranges", [(8, [(0, 4), (4, 8)]), (7, [(0, 4), (4, 7)]), (1, [(0, 1), (1, 1)])])
def test_the_rows_of_a_process_are_those_of_torch_chunk(rows, ranges):
    worlds = [World(torch.device("cpu"), rank, 2) for rank in (0, 1)]
    assert [row_range(rows, world) for world in worlds] == ranges


def test_eight_processes_hold_every_row_once_and_each_can_take_a_step(world):
    """One process plays all eight in turn: torch's fake group exchanges nothing, so shapes are right and sums are not."""
    whole = MultimodalLLM.from_towers(world.folder / "clip", world.folder / "qwen")
    parts = {name: [] for name, _ in whole.language_model.named_parameters()}
    for rank in range(8):
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        try:
            model = MultimodalLLM.from_towers(world.folder / "clip", world.folder / "qwen")
            model.vision_tower.requires_grad_(False)
            shard_(model, World(torch.device("cpu"), rank, 8))
            for name, p in model.language_model.named_parameters():
                parts[name].append(local(p).detach().clone())
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            side = model.config.vision.image_size
            loss, _ = model(torch.arange(6)[None], torch.arange(6)[None], torch.zeros(0, 3, side, side))
            loss.backward()
            optimizer.step()
            assert all(local(p.grad).shape == local(p).shape for p in model.language_model.parameters())
        finally:
            distributed.destroy_process_group()
    for name, p in whole.language_model.named_parameters():
        assert torch.equal(torch.cat(parts[name]), p), name


@pytest.mark.parametrize(
    "change, processes, wanted",
    [
        ({}, 1, False),
        ({}, 2, True),
        ({"training.sharding": "none"}, 2, False),
        ({"model.use_lora": "true"}, 2, False),
        ({"training.stage2.train": "projector"}, 2, False),
        ({"training.stage2.epochs": "0"}, 2, False),
        ({"training.sharding": "full", "model.use_lora": "true"}, 2, True),
        ({"training.sharding": "full"}, 1, False),
    ],
)
def test_weights_are_sharded_where_the_language_model_itself_is_trained_by_several(change, processes, wanted):
    config = ExperimentConfig()
    for name, text in change.items():
        config.set_text(name, text)
    assert is_wanted(config, processes) == wanted


# Whole runs


def directory_of(config: ExperimentConfig) -> Path:
    return Path(config.output_dir) / config.experiment_name


def run_of(world, folder: Path, processes: int = 1, **training) -> ExperimentConfig:
    """Six steps of four samples, however many processes share them; every step is saved."""
    settings = {"save_steps": 1, "keep_checkpoints": 100, "num_sample_captions": 0} | training
    config = world.config(folder, **settings)
    config.data.max_train_samples, config.data.max_val_samples = 12, 3
    config.data.batch_size, config.training.gradient_accumulation_steps = 1, 4 // processes
    folder.mkdir()
    config.save(folder / "config.json")
    return config


def train_job(config: ExperimentConfig, processes: int, **more: object) -> dict:
    file = Path(config.output_dir) / "config.json"
    return {"name": file.parent.name, "processes": processes, "do": "train", "config": str(file)} | more


def steps_saved(config: ExperimentConfig) -> list[int]:
    return [disk.step_of(path) for path in disk.checkpoints(directory_of(config))]


def tensors_at(config: ExperimentConfig, step: int) -> dict[str, torch.Tensor]:
    checkpoint = next(path for path in disk.checkpoints(directory_of(config)) if disk.step_of(path) == step)
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "training" / "optimizer.safetensors")


def losses(config: ExperimentConfig) -> list[float]:
    return [row.get("loss", row.get("val_loss")) for row in read_metrics(directory_of(config))]


def cut(config: ExperimentConfig, source: ExperimentConfig, step: int) -> None:
    """Make `config`'s run what `source`'s was after `step`."""
    shutil.copytree(directory_of(source), directory_of(config), symlinks=True)
    for checkpoint in disk.checkpoints(directory_of(config)):
        if disk.step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)


def far(config: ExperimentConfig, other: ExperimentConfig) -> float:
    """The largest difference of any number in the last checkpoints of two runs."""
    step = steps_saved(other)[-1]
    mine, theirs = tensors_at(config, step), tensors_at(other, step)
    assert mine.keys() == theirs.keys()
    return max((mine[name] - theirs[name]).abs().max().item() for name in mine)


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    config = run_of(world, tmp_path_factory.mktemp("alone") / "run")
    assert train(config) == 0
    return config


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """The configurations of some runs by name, and what they left."""
    folder = tmp_path_factory.mktemp("runs")
    configs = {
        "two, sharded": run_of(world, folder / "two, sharded", 2, num_sample_captions=1, best_metric="cider"),
        "two, replicated": run_of(world, folder / "two, replicated", 2, sharding="none"),
        "half": run_of(world, folder / "half", bf16=True),
        "half, two": run_of(world, folder / "half, two", 2, bf16=True, gradient_checkpointing=True),
        "adapters": run_of(world, folder / "adapters"),
        "adapters, two": run_of(world, folder / "adapters, two", 2, sharding="full"),
    }
    for name in ("half", "half, two", "adapters", "adapters, two"):  # one step in each stage
        configs[name].data.max_train_samples, configs[name].training.save_steps = 4, None
    for name in ("adapters", "adapters, two"):
        configs[name].model.use_lora = configs[name].model.load_in_8bit = True
        configs[name].model.lora_config.lora_dropout = 0.0
    for name, config in configs.items():
        config.save(folder / name / "config.json")
    done = launch(folder, [train_job(config, 2 if "two" in name else 1) for name, config in configs.items()])
    assert {code for codes in done.codes.values() for code in codes} == {0}, "".join(map(done.all_said, done.codes))
    return configs, done


@pytest.fixture(scope="module")
def resumed(world, alone, runs, tmp_path_factory):
    """The same for runs that go on from a checkpoint of another."""
    folder = tmp_path_factory.mktemp("resumed")
    configs, jobs = {}, []
    for name, processes, source, step, training in (
        ("two again", 2, runs[0]["two, sharded"], 4, {}),
        ("one from two", 1, runs[0]["two, sharded"], 2, {}),
        ("four from one", 4, alone, 4, {}),
        ("sharded from replicated", 2, runs[0]["two, replicated"], 5, {"reshard_after_forward": True}),
    ):
        configs[name] = run_of(world, folder / name, processes, **training)
        cut(configs[name], source, step)
        jobs.append(train_job(configs[name], processes, resume="auto"))
    return configs, launch(folder, jobs)


def test_a_sharded_model_trains_as_one_process_would(alone, runs):
    configs, done = runs
    for name in ("two, sharded", "two, replicated"):
        assert losses(configs[name]) == pytest.approx(losses(alone), abs=2e-6)
        assert far(configs[name], alone) < 1e-6
        assert steps_saved(configs[name]) == list(range(1, 7))
        assert done.said(name, 0).count("stage 2: 3 steps of 1 x 2 x 2 processes samples") == 1
        assert done.said(name, 1) == "", "only rank 0 prints"
    assert done.said("two, sharded", 0).count(" | CIDEr ") == 2


def test_the_files_of_a_sharded_model_are_those_of_a_whole_one(alone, runs):
    """The same tensors in the same places: only their last bits may differ."""
    configs, _ = runs
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        first, other = (
            (disk.checkpoints(directory_of(config))[-1] / name).read_bytes()
            for config in (alone, configs["two, sharded"])
        )
        header = 8 + int.from_bytes(first[:8], "little")
        assert len(first) == len(other) and first[:header] == other[:header]
    assert MultimodalLLM.from_pretrained(directory_of(configs["two, sharded"]) / "best_model").processor is not None


def test_a_sharded_model_trains_in_bfloat16_with_recomputed_blocks(runs):
    """Sums of bfloat16 gradients in another order: near, not equal."""
    configs, _ = runs
    assert losses(configs["half, two"]) == pytest.approx(losses(configs["half"]), abs=1e-2)


def test_adapters_on_an_int8_base_can_be_sharded_too(runs):
    configs, _ = runs
    assert losses(configs["adapters, two"]) == pytest.approx(losses(configs["adapters"]), abs=2e-6)
    assert far(configs["adapters, two"], configs["adapters"]) < 1e-6
    files = [disk.checkpoints(directory_of(configs[name]))[-1] for name in ("adapters", "adapters, two")]
    mine, theirs = (load_file(file / "adapter_model.safetensors") for file in files)
    assert max((mine[name] - theirs[name]).abs().max().item() for name in mine) < 1e-6


def test_as_many_processes_go_on_bit_for_bit(runs, resumed):
    (configs, done), sharded = resumed, runs[0]["two, sharded"]
    assert done.codes["two again"] == [0, 0], done.all_said("two again")
    assert far(configs["two again"], sharded) == 0
    assert losses(configs["two again"]) == losses(sharded)


@pytest.mark.parametrize("name", ["one from two", "four from one", "sharded from replicated"])
def test_another_number_of_processes_goes_on_as_well(alone, resumed, name):
    configs, done = resumed
    assert set(done.codes[name]) == {0}, done.all_said(name)
    assert far(configs[name], alone) < 1e-6
    assert losses(configs[name]) == pytest.approx(losses(alone), abs=2e-6)
    then_now = {"one from two": (2, 1), "four from one": (1, 4)}.get(name)
    line = "changed: processes: {} at the checkpoint, {} now".format(*then_now) if then_now else ""
    assert line in done.said(name, 0) and ("changed: processes" in done.said(name, 0)) == bool(then_now)


def test_stage_3_sharded_or_not_takes_the_same_steps_and_goes_on(world, alone, tmp_path):
    """Each process samples the captions of its own images, at its own pace."""
    kinds = {
        "replicated": {"sharding": "none"},
        "sharded": {},
        "resumed": {},
    }
    taught = run_of(world, tmp_path / "taught", stage1=StageConfig(epochs=0), learning_rate=5e-3, save_steps=None)
    taught.training.stage2, taught.training.gradient_accumulation_steps = StageConfig(epochs=9), 1
    assert train(taught) == 0
    configs = {}
    for name, settings in kinds.items():
        configs[name] = run_of(world, tmp_path / name, 2, best_metric="cider", num_metric_samples=1, **settings)
        configs[name].model.pretrained = str(directory_of(taught) / "best_model")
        for stage in ("stage1", "stage2"):
            setattr(configs[name].training, stage, StageConfig(epochs=0))
        configs[name].training.stage3 = RewardConfig(epochs=1, learning_rate=1e-3, max_new_tokens=12)
        configs[name].save(tmp_path / name / "config.json")
    done = launch(tmp_path, [train_job(configs[name], 2) for name in ("replicated", "sharded")])
    assert [code for codes in done.codes.values() for code in codes] == [0] * 4, done.all_said("sharded")
    assert {0} != {row["reward"] for row in read_metrics(directory_of(configs["sharded"])) if "reward" in row}
    assert far(configs["sharded"], configs["replicated"]) < 1e-5
    assert losses(configs["sharded"]) == pytest.approx(losses(configs["replicated"]), abs=1e-4)
    cut(configs["resumed"], configs["sharded"], 2)
    done = launch(tmp_path, [train_job(configs["resumed"], 2, resume="auto")])
    assert done.codes == {"resumed": [0, 0]}, done.all_said("resumed")
    assert far(configs["resumed"], configs["sharded"]) == 0
    assert losses(configs["resumed"]) == losses(configs["sharded"])


def test_torchrun_starts_and_ends_a_run(world, tmp_path):
    config = run_of(world, tmp_path / "run", 2, save_steps=None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "train.py"), str(tmp_path / "run" / "config.json"), "stage1.epochs=0", "max_train_samples=4"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("stage 2: 1 steps of 1 x 2 x 2 processes samples") == 1
    assert steps_saved(config) == [1]


# Faults


@pytest.fixture(scope="module")
def faults(world, tmp_path_factory):
    """What runs of two processes left after something went wrong in the second, in its third step."""
    folder = tmp_path_factory.mktemp("faults")
    configs = {
        # no checkpoint and no validation before the fault, so that nothing else may take so long
        "hang": run_of(world, folder / "hang", 2, timeout_s=4, save_steps=None),
        "die": run_of(world, folder / "die", 2),
        "ask to stop": run_of(world, folder / "ask to stop", 2),
        "fill disk": run_of(world, folder / "fill disk", 2),
    }
    jobs = [train_job(config, 2, fault=[name, 1, 3], in_background=name == "hang") for name, config in configs.items()]
    configs["bad input"] = run_of(world, folder / "bad input", 2)
    configs["bad input"].data.train_data_path = "nowhere.json"
    configs["bad input"].save(folder / "bad input" / "config.json")
    configs["nan"] = run_of(broken_world(folder), folder / "nan", 2)
    configs["nan"].training.stage1.epochs = 0
    configs["nan"].save(folder / "nan" / "config.json")
    (folder / "damaged world").mkdir()
    damaged = write_world(folder / "damaged world")
    break_image(damaged.folder / "images" / f"{sample_order(12, 1, 0)[6]}.png")  # of the second step
    configs["damaged"] = run_of(damaged, folder / "damaged", 2, save_steps=None)
    (folder / "damaged validation world").mkdir()
    damaged = write_world(folder / "damaged validation world")
    break_image(damaged.folder / "images" / "22.png")
    configs["damaged validation"] = run_of(damaged, folder / "damaged validation", 2, save_steps=None)
    jobs += [train_job(configs[name], 2) for name in ("bad input", "nan", "damaged", "damaged validation")]
    jobs.append(train_job(configs["die"], 2, resume="auto") | {"name": "die, resumed"})
    jobs.append({"name": "loading", "processes": 2, "do": "loading", "fault": ["die", 1, 0]})
    return configs, launch(folder, jobs)


def broken_world(folder: Path):
    """A world in which one image is asked about with a word whose embedding is not a number."""
    (folder / "broken world").mkdir()
    return poison(write_world(folder / "broken world", tie_word_embeddings=False), 5)


def test_a_process_that_dies_is_named_by_the_others(faults):
    _, done = faults
    assert done.codes["die"] == [1, -9]
    assert "error: lost contact with rank 1 (in step 3): it was killed" in done.said("die", 0)


def test_a_process_that_dies_while_models_load_is_named_by_the_others(faults):
    _, done = faults
    assert done.codes["loading"] == [1, -9]
    assert "error: ended by SIGTERM: lost contact with rank 1: it was killed" in done.said("loading", 0)


def test_of_those_that_do_not_answer_the_one_that_has_ended_is_named(monkeypatch):
    """The other may be waiting for the first to leave, and notice only then."""
    monkeypatch.setattr("mmllm.runtime.distributed.GRACE_S", 0)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    store = torch.distributed.HashStore()
    for rank, process in enumerate((os.getpid(), os.getpid(), ended.pid)):
        store.set(f"process {rank}", f"{platform.node()} {process}")
        store.set(f"position {rank}", "in step 3")
    world = World(torch.device("cpu"), rank=0, size=3, store=store)
    assert world.lost().startswith("lost contact with rank 2 (in step 3): ")


def test_what_a_dead_process_left_half_done_is_done_again(faults, alone):
    configs, done = faults
    assert done.codes["die, resumed"] == [0, 0], done.all_said("die, resumed")
    assert "going on from" in done.said("die, resumed", 0)
    assert far(configs["die"], alone) < 1e-6
    assert not list(directory_of(configs["die"]).glob(".checkpoint*"))


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for a process as only Linux can")
def test_a_run_killed_at_random_moments_always_goes_on_to_the_same_end(world, tmp_path):
    configs = [world.config(tmp_path / name, save_steps=1) for name in ("whole", "killed")]
    for config in configs:
        config.data.max_train_samples = 8  # two steps in each stage
        config.data.val_data_path = None
        Path(config.output_dir).mkdir()
        config.save(Path(config.output_dir) / "config.json")
    kill = train_job(configs[1], 1, times=6, seed=7) | {"do": "kill"}
    done = launch(tmp_path, [train_job(configs[0], 1), kill])
    assert done.codes["whole"] == [0], done.said("whole", 0)
    assert set(done.codes["killed"]) == {0}, done.said("killed", 0)
    wanted = read_run(directory_of(configs[0]))
    for end in range(1, len(done.codes["killed"]) + 1):
        assert read_run(tmp_path / "killed" / f"tiny-{end}") == wanted


def read_run(directory: Path) -> tuple[bytes, bytes, list[tuple[int, float]]]:
    """The files of the last checkpoint, and the steps with their losses."""
    last = disk.checkpoints(directory)[-1]
    files = ((last / name).read_bytes() for name in ("model.safetensors", "training/optimizer.safetensors"))
    return *files, [(row["step"], row["loss"]) for row in read_metrics(directory)]


def test_a_process_that_hangs_is_named_after_the_time_that_the_settings_give_it(faults):
    _, done = faults
    assert done.codes["hang"] == [1, -9]
    assert "error: lost contact with rank 1 (in step 3): it was killed, or gave no answer for 4 s" in done.said(
        "hang", 0
    )


def test_a_signal_to_one_process_saves_and_stops_them_all_after_the_same_step(faults):
    configs, done = faults
    assert done.codes["ask to stop"] == [143, 143]
    assert "stopped by SIGTERM; saved" in done.said("ask to stop", 0)
    assert steps_saved(configs["ask to stop"]) == [1, 2, 3]


def test_a_full_disk_of_one_process_is_tolerated_once_and_then_ends_them_all(faults):
    configs, done = faults
    assert done.codes["fill disk"] == [1, 1], done.all_said("fill disk")
    assert done.said("fill disk", 0).count("cannot be written (File too large); nothing was left behind; the run") == 1
    assert "error: " in done.said("fill disk", 0)
    assert steps_saved(configs["fill disk"]) in ([1], [1, 2])  # the second may be in progress when the disk fills up
    assert not list(directory_of(configs["fill disk"]).glob(".checkpoint*"))


def test_bad_input_is_reported_once(faults):
    _, done = faults
    assert done.codes["bad input"] == [2, 2]
    assert done.all_said("bad input").count("error: nowhere.json: cannot be read") == 1


@pytest.mark.parametrize("name, step", [("damaged", 1), ("damaged validation", 3)])
def test_an_image_that_proves_broken_in_one_process_ends_them_all_with_the_steps_before_it_saved(faults, name, step):
    configs, done = faults
    assert done.codes[name] == [2, 2], done.all_said(name)
    assert re.search(rf"error: .*png: broken or cut off.* Saved .*step-{step}: mend the file", done.all_said(name))
    assert steps_saved(configs[name]) == [step]


def test_a_loss_that_is_not_finite_in_one_process_stops_them_all_before_the_update(faults):
    configs, done = faults
    assert done.codes["nan"] == [1, 1], done.all_said("nan")
    assert re.search("loss nan, gradient norm nan, with the samples .*s5[,;]", done.said("nan", 0)), "of either process"
    for step in steps_saved(configs["nan"]):
        tensors = tensors_at(configs["nan"], step)
        assert all(
            value.isfinite().all() for name, value in tensors.items() if not name.endswith("embed_tokens.weight")
        )


@pytest.mark.parametrize("rank", ["0", "1"])
def test_more_processes_than_gpus_are_refused(monkeypatch, rank):
    """In every process, the first one too: it is the one that says so, and would wait for the others otherwise."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": rank, "RANK": rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mmllm.runtime.distributed.choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="torchrun started 2 processes for 1 GPUs; lower --nproc_per_node"):
        World.start("auto")
