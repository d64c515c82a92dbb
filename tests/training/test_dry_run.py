"""Memory before it is taken, and what is said when it does not suffice."""

import pytest
import torch

from benchmarks import memory as bench_memory
from benchmarks.random_model import random_model, sizes
from mmllm.config.schema import ExperimentConfig
from mmllm.errors import RunError
from mmllm.models.multimodal import MultimodalLLM
from mmllm.training import experiment, stage
from mmllm.training.out_of_memory import is_out_of_memory, named_out_of_memory, smaller
from mmllm.training.step_memory import GAPS, LiveBytes, stage_memory, step_peak
from tiny_run import write_world

CPU = torch.device("cpu")
# torch's words, from c10/core/impl/alloc_cpu.cpp
NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
)


def predicted(*settings, stage=2, rows=2):
    config = ExperimentConfig()
    config.data.max_length, config.data.batch_size = 64, rows
    for setting in settings:
        config.set_text(*setting.split("="))
    return stage_memory(sizes("tiny"), config, config.stages()[stage - 1], "cpu")


def test_bytes_count_while_somebody_holds_them_and_views_count_once():
    old = torch.zeros(1000)
    with LiveBytes([old]) as live:
        x = torch.ones(250)
        y = x.view(10, 25).t()
        old.view(10, 100)
        assert (live.now, live.peak) == (1000, 1000)
        z = y + 1
        del x, y
        assert (live.now, live.peak) == (1000, 2000)
        del z
    assert (live.now, live.peak) == (0, 2000)


def test_a_step_without_contents_takes_what_the_real_one_takes():
    """The same counter on real tensors, by the model's own forward pass."""
    shape, rows, length, answered = sizes("tiny"), 2, 40, 8
    model = random_model(shape)
    ids_BT = torch.ones(rows, length, dtype=torch.long)
    ids_BT[:, 4 : 4 + shape.num_image_tokens] = shape.image_token_id
    labels_BT = torch.full_like(ids_BT, -100)
    labels_BT[:, -answered:] = 1
    pixels = torch.zeros(rows, 3, 32, 32)
    with LiveBytes([*model.parameters(), ids_BT, labels_BT, pixels]) as live:
        loss, _ = model(ids_BT, labels_BT, pixels)
        loss.backward()
        del loss
    peak = step_peak(
        lambda: MultimodalLLM(shape), rows=rows, length=length, targets=rows * answered, images=rows, bf16=False
    )
    assert peak == pytest.approx(live.peak, rel=0.03)


@pytest.mark.slow
def test_what_is_frozen_recomputed_or_int8_takes_less():
    stage_1, full, lora = predicted(stage=1), predicted(), predicted("model.use_lora=true")
    recomputed = predicted("training.gradient_checkpointing=true", rows=16)
    int8 = predicted("model.use_lora=true", "model.load_in_8bit=true")
    assert full.weights == 4 * sum(p.numel() for p in MultimodalLLM(sizes("tiny")).parameters())
    assert stage_1.weights < full.weights, "frozen weights are held in bfloat16"
    assert full.moments > 5 * lora.moments > 0
    assert predicted("training.optimizer=adamw8bit").moments < 0.35 * full.moments
    assert stage_1.moments == pytest.approx(8 * (64 * 64 + 64) * 2)
    assert recomputed.step < 0.7 * predicted(rows=16).step
    assert int8.weights < lora.weights < full.weights


def test_further_micro_batches_hold_the_gradients_of_the_first():
    once, many = predicted(), predicted("training.gradient_accumulation_steps=4")
    assert 0 < (many.step - once.step) / GAPS["cpu"] < full_gradients()


def full_gradients():
    return 4 * sum(p.numel() for p in random_model(sizes("tiny")).parameters())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["stage 1", "stage 2, LoRA on int8"])  # the others: python -m benchmarks memory
def test_the_predicted_peak_is_within_15_percent_of_a_real_process(case):
    spec = {"device": "cpu", "size": "full", "layers": 2, "rows": 2}
    for row in bench_memory.measure([case], spec, variants=((True, False),)):
        assert abs(row["error"]) < 0.15, row


# When it does not suffice


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(NO_MEMORY)], ids=type
)
def test_out_of_memory_names_the_settings_to_try(error):
    config = ExperimentConfig()
    config.set_text("data.batch_size", "32")
    config.set_text("training.gradient_accumulation_steps", "8")
    with pytest.raises(RunError) as caught, named_out_of_memory(config, 2, CPU):
        raise error
    message = str(caught.value)
    assert message.startswith("out of memory at ") and "\n" not in message
    assert "in stage 2, at its start, with batches of 32 samples" in message
    assert "try data.batch_size=16 training.gradient_accumulation_steps=16 (the gradient is the same)" in message


def test_another_error_keeps_its_own_words():
    named = named_out_of_memory(ExperimentConfig(), 1, CPU)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught, named:
        raise RuntimeError("shapes cannot be multiplied")
    assert not is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "settings, advice",
    [
        (["stage1.batch_size=3"], "training.stage1.batch_size=1 training.stage1.gradient_accumulation_steps=3 (the"),
        (["data.batch_size=1"], "training.gradient_checkpointing=true (slower, the gradient is the same)"),
        (["data.batch_size=1", "gradient_checkpointing=true", "max_length=512"], "data.max_length=256"),
    ],
)
def test_the_advice_is_the_next_smaller_setting(settings, advice):
    config = ExperimentConfig()
    for setting in settings:
        config.set_text(*setting.split("="))
    assert smaller(config, 1).startswith(advice)


def test_a_run_that_finds_no_memory_ends_with_the_advice(tmp_path, monkeypatch):
    config = write_world(tmp_path).config(tmp_path / "out")

    forward, calls = MultimodalLLM.forward, []

    def no_memory_in_step_3(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError(NO_MEMORY)
        return forward(*arguments)

    monkeypatch.setattr(MultimodalLLM, "forward", no_memory_in_step_3)
    words = "in stage 1, in step 3, micro-batch 2 of 2, with batches of 2 .* data.batch_size=1 .*accumulation_steps=4"
    with pytest.raises(RunError, match=words):
        experiment.train(config)


@pytest.mark.parametrize(
    "owner, what, place",
    [(stage.Stage, "validate", "validation or checkpoint after step 5"), (stage, "step_batches", "at its")],
)
def test_memory_that_runs_out_beside_the_steps_is_reported_as_well(tmp_path, monkeypatch, owner, what, place):
    """In a validation, or where a worker makes a batch."""
    config = write_world(tmp_path).config(tmp_path / "out")

    def no_memory(*arguments):
        raise MemoryError

    monkeypatch.setattr(owner, what, no_memory)
    with pytest.raises(RunError, match=f"out of memory at .* in stage 1, .*{place}.*; try data.batch_size=1"):
        experiment.train(config)
