"""Benchmarks measure what they say: the same work on both sides, in turns, with goals and tables made from the rows."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import caption as bench_caption
from benchmarks import generate as bench_generate
from benchmarks import gpu as bench_gpu
from benchmarks import load as bench_load
from benchmarks import runner
from benchmarks import train as bench_train
from benchmarks.random_model import prompt_ids, random_tokenizer, sizes, write_model
from benchmarks.rows import BEGIN, END, Goal, goal_lines, read_rows, remember, rewritten, save_rows
from benchmarks.runner import compete, speeds
from benchmarks.table import tables
from benchmarks.train import OURS, PEER
from conftest import ROOT
from mmllm.errors import RunError, UserError
from mmllm.models.multimodal import MultimodalLLM

SPEC = {"bench": "train", "size": "tiny", "layers": None, "rows": 2, "device": "cpu", "bf16": False}
ROW = {
    "device": "cpu",
    "case": "stage 1",
    "contestant": OURS,
    "rows": 8,
    "seconds": 2.0,
    "steps_per_s": 0.5,
    "tokens_per_s": 512.0,
    "tflops_per_s": 0.25,
    "mfu": None,
    "peak_bytes": 3_000_000_000,
    "date": "2026-01-01",
    "commit": "abc",
    "machine": {"cpu": "AMD", "cores": 2, "threads": 2, "torch": "2.13"},
    "command": "python -m benchmarks train",
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's, of transformers
@pytest.mark.parametrize("case", ["stage 1", "stage 2, full", "stage 2, LoRA"])
def test_both_sides_of_a_training_step_compute_the_same_loss(case):
    losses = []
    for contestant in (OURS, PEER):
        loaded, turn = bench_train.build(SPEC | {"case": case, "contestant": contestant})
        losses.append(turn({})["loss"])
        assert loaded["rows"] == 2
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def contestants(case):
    return bench_train.contestants(bench_train.BY_NAME[case], SPEC)


@pytest.mark.parametrize("case", ["stage 2, full", bench_train.FIVE, bench_train.LENGTHS])
def test_what_makes_a_step_cheaper_changes_no_loss(case):
    specs = [spec for spec in contestants(case) if spec["contestant"] != PEER]
    losses = [bench_train.own_step(spec)() for spec in specs]
    assert len(losses) > 1
    assert losses == pytest.approx([losses[0]] * len(losses), abs=2e-5)


@pytest.mark.parametrize(
    "case, cheap, full", [(bench_train.FIVE, 70 + 5 * 12, 5 * (70 + 12)), (bench_train.LENGTHS, 892, 932)]
)
def test_a_cheaper_step_has_fewer_tokens(case, cheap, full):
    tokens = [sum(batch.ids_BT.numel() for batch in bench_train.batches_of(spec)) for spec in contestants(case)]
    assert tokens == [cheap, full]


@pytest.mark.slow
def test_the_loss_curve_on_an_int8_base_is_within_2_percent_of_the_float_one():
    curves = []
    for case in ("stage 2, LoRA", "stage 2, LoRA on int8"):
        step = bench_train.own_step(contestants(case)[0] | {"bf16": True, "rate": 3e-3})
        torch.manual_seed(0)  # the same dropout in both
        curves.append([step() for _ in range(30)])
    plain, int8 = curves
    assert plain[-1] < 0.8 * plain[0], "else nothing was trained, and the curves prove nothing"
    assert max(abs(a / b - 1) for a, b in zip(int8, plain, strict=True)) < 0.02


def test_the_model_of_a_benchmark_is_the_published_one_in_shape():
    with torch.device("meta"):
        model = MultimodalLLM(sizes())
    assert sum(p.numel() for p in model.parameters()) == 582_981_504
    assert sizes().image_token_id == 151655
    tokenizer = random_tokenizer()
    assert [tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|image_pad|>")] == [151643, 151655]


@pytest.mark.slow
def test_contestants_in_processes_of_their_own_take_turns_and_a_dead_one_is_named(monkeypatch):
    monkeypatch.setattr(runner, "Here", runner.Contestant)
    spec = SPEC | {"case": "stage 1", "contestant": OURS, "layers": 1, "turns": [{"case": "stage 1"}]}
    (row,) = compete([spec], rounds=2)
    assert (row["case"], row["turns"]) == ("stage 1", 2)
    assert row["seconds"] > 0 and row["peak_bytes"] > 10_000_000
    with pytest.raises(RunError, match="mmllm ended with code 1: KeyError: 'no such bench'"):
        compete([spec | {"bench": "no such bench"}], rounds=1)


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    """What a contestant in answering needs: a model of random weights on disk."""
    model = write_model(tmp_path_factory.mktemp("bench") / "model", sizes("tiny"))
    return SPEC | {"bench": "generate", "model": str(model), "precision": "float32", "compiled": False}


def test_both_sides_answer_with_as_many_tokens_as_were_asked_for(answering):
    for kind in ("ours", "transformers"):
        loaded, turn = bench_generate.build(answering | {"kind": kind})
        assert loaded["weight_bytes"] == 4 * 205_888, "the tied head counts once"
        row = turn({"case": "batch 2", "rows": 2, "new_tokens": 4})
        assert row["tokens_per_s"] == pytest.approx(2 * row["steps_per_s"], rel=1e-6)
        assert 0 < row["first_token_s"] < row["total_s"]


def test_the_rate_of_a_batch_is_that_of_the_time_when_all_its_rows_are_under_way():
    token_times = [(0, 1.0), (0, 2.0), (1, 3.0), (0, 4.0), (1, 4.0), (0, 5.0), (1, 5.0), (1, 6.0)]
    row = speeds(token_times, begin=0.5, total=6.0, rows=2)
    assert row == {"first_token_s": 0.5, "tokens_per_s": 2.0, "steps_per_s": 1.0, "total_s": 6.0, "rows": 2}


def test_the_prompt_is_an_image_and_32_tokens():
    ids = prompt_ids({"size": "full", "layers": None}, 0)
    assert len(ids) == 32 + 49 and ids.count(151655) == 49
    assert max(token for token in ids if token != 151655) < 151643


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # its own
def test_llama_cpp_answers_from_our_weights(answering):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    for kind in ("BF16", "Q8_0"):
        loaded, turn = bench_generate.build(answering | {"kind": "llama.cpp", "precision": kind})
        assert turn({"new_tokens": 4})["tokens_per_s"] > 0


@pytest.mark.slow
def test_a_bench_is_one_command_from_random_weights_to_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_generate.peers, "has_transformers", lambda: False)  # 5 s to import
    monkeypatch.setattr(bench_generate.llama, "is_installed", lambda: False)
    options = ["--size", "tiny", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path / "rows")]
    generate = ["generate", *options, "--new-tokens", "4", "--batch", "1", "--precision", "float32"]
    assert bench.main([*generate, "--models", str(tmp_path / "models")]) == 0
    rows = {(row["case"], row["contestant"]): row for row in read_rows(tmp_path / "rows", "generate")}
    assert rows["batch 1", "mmllm float32"]["bandwidth_share"] > 0
    assert rows["sample.py, 20 tokens", "mmllm float32"]["total_s"] > 0
    assert "mmllm float32" in tables(tmp_path / "rows")


@pytest.mark.slow
def test_a_run_of_a_configuration_is_rehearsed_on_random_weights(tmp_path):
    """configs/small.py whole: 2 + 1 epochs, adapters, int8 base, accumulation."""
    command = ["rehearse", "configs/small.py", "training.gradient_accumulation_steps=2", "--samples", "16"]
    where = ["--size", "tiny", "--device", "cpu", "--models", str(tmp_path / "models"), "--out", str(tmp_path / "rows")]
    assert bench.main([*command, *where]) == 0
    (row,) = read_rows(tmp_path / "rows", "rehearse")
    assert (row["case"], row["steps"], row["settings"]) == (
        "configs/small.py",
        3,
        ["training.gradient_accumulation_steps=2"],
    )
    assert "| 3 |" in tables(tmp_path / "rows")
    run = next((tmp_path / "models").glob("*/runs/rehearsal"))
    assert (run / "report.md").is_file() and (run / "best_model" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_make_gpu_refuses_in_one_line_where_there_is_none(tmp_path):
    with pytest.raises(UserError, match="make gpu measures on a CUDA GPU, and there is none here"):
        bench.main(["gpu", "--out", str(tmp_path)])


@pytest.mark.slow
def test_a_part_of_make_gpu_that_fails_or_hangs_does_not_stop_the_next(tmp_path, capsys):
    parts = {"bad": (60, ["-c", "1/0"]), "slow": (1, ["-c", "while True: pass"]), "good": (60, ["-c", "print(7)"])}
    assert bench_gpu.run_parts(parts, tmp_path) == 1
    out = capsys.readouterr().out
    assert "bad: failed with code 1" in out and "slow: took too long" in out and "good: ok" in out
    assert "ZeroDivisionError" in (tmp_path / "bad.txt").read_text()
    assert (tmp_path / "good.txt").read_text() == "7\n"


def test_the_parts_of_make_gpu_take_less_than_nine_minutes(tmp_path):
    parts = bench_gpu.parts(tmp_path, "cuda")
    assert sum(limit for limit, _ in parts.values()) < 9 * 60
    for _, command in parts.values():
        if command[1] == "benchmarks":
            assert bench.parse(command[2:]).device == "cuda"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_every_part_of_make_gpu_runs_on_a_cpu_with_tiny_models(tmp_path, capsys):
    assert bench.main(["gpu", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(": ok, ") == 5
    contestants = {row["contestant"] for row in read_rows(tmp_path, "generate")}
    assert {"mmllm int8", "transformers bfloat16 compiled"} <= contestants
    for file in bench_gpu.GPU_TESTS:
        assert "mark.gpu" in (ROOT / file).read_text()


def test_a_row_takes_the_place_of_an_older_one_of_the_same_key(tmp_path):
    save_rows(tmp_path, "train", [ROW, ROW | {"contestant": PEER}])
    save_rows(tmp_path, "train", [ROW | {"seconds": 1.0}])
    assert [(row["contestant"], row["seconds"]) for row in read_rows(tmp_path, "train")] == [(OURS, 1.0), (PEER, 2.0)]
    for line in (tmp_path / "train.jsonl").read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize(
    "bound, at_most, reached", [(2.0, False, "yes"), (2.5, False, "no"), (2.0, True, "yes"), (1.9, True, "no")]
)
def test_a_goal_is_a_bound_on_one_row_over_another(bound, at_most, reached):
    rows = [ROW | {"steps_per_s": 1.0}, ROW | {"contestant": PEER}]
    goal = Goal("train", "cpu", "speed", "steps_per_s", ("stage 1", OURS), bound, ("stage 1", PEER), at_most)
    words = "at most" if at_most else "at least"
    assert goal_lines((goal,), "train", rows, "cpu") == [("speed", "2", f"{words} {bound:g}", reached)]
    assert goal_lines((goal,), "train", rows[:1], "cpu") == [("speed", "not measured", f"{words} {bound:g}", "-")]


def made_up_runs(folder, *ratios):
    """Runs of stage 1 in which ours is so many times as fast as the other."""
    for number, ratio in enumerate(ratios):
        row = ROW | {"commit": f"{number}234567", "steps_per_s": ratio}
        save_rows(folder, "train", [row, row | {"contestant": PEER, "steps_per_s": 1.0}])
        remember(folder, "train", bench_train.GOALS[:1])


def test_the_history_keeps_a_ratio_of_each_run_once(tmp_path):
    made_up_runs(tmp_path, 1.9, 2.0)
    remember(tmp_path, "train", bench_train.GOALS[:1])
    about = {"date": "2026-01-01", "device": "cpu", "ratio": "stage 1: speed against transformers + peft"}
    wanted = [about | {"commit": "0234567", "value": 1.9}, about | {"commit": "1234567", "value": 2.0}]
    assert read_rows(tmp_path, "history") == wanted
    assert "| stage 1: speed against transformers + peft | 1.9 (0234567), 2 (1234567) |" in tables(tmp_path)
    save_rows(tmp_path, "train", [ROW | {"steps_per_s": 9.0, "commit": "2"}])
    remember(tmp_path, "train", bench_train.GOALS[:1])
    assert read_rows(tmp_path, "history") == wanted, "the two sides are of different runs"


@pytest.mark.parametrize("ratios, before", [((2, 2.2, 1.8, 1.9), None), ((2, 2.2, 1.8, 1.8), "2.1"), ((2, 1), None)])
@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_ratio_over_10_percent_worse_in_two_runs_is_marked_and_red(
    ratios, before, is_terminal, tmp_path, capsys, monkeypatch
):
    made_up_runs(tmp_path, *ratios)
    page = tmp_path / "benchmarks.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    assert bench.main(["table", "--out", str(tmp_path), "--page", str(page)]) == 0
    said = f"over 10 % worse in two runs than before: {before}"
    assert (f"| yes; {said} |" in page.read_text()) == bool(before)
    line = f"stage 1: speed against transformers + peft: 1.8, {said}\n"
    out = capsys.readouterr().out
    assert (line in out) == (bool(before) and not is_terminal)
    assert (f"\033[31m{line[:-1]}\033[0m\n" in out) == (bool(before) and is_terminal)


def test_an_unknown_case_is_refused_with_those_there_are():
    with pytest.raises(UserError, match="--case 'stage 3': there are stage 1, stage 2, full"):
        bench.main(["train", "--case", "stage 3"])


def test_the_table_command_writes_the_rows_between_the_markers(tmp_path):
    save_rows(tmp_path, "train", [ROW, ROW | {"contestant": PEER, "seconds": 4.0, "steps_per_s": 0.25}])
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert bench.main(["table", "--out", str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| stage 1, 8 rows | mmllm | 2 | 512 | 0.25 | - | 3.0 GB |" in text
    assert "| stage 1: speed against transformers + peft | 2 | at least 1.8 | yes |" in text
    assert "2 threads of AMD, torch 2.13, 2026-01-01, commit abc: `python -m benchmarks train`." in text
    with pytest.raises(UserError, match="has no part between"):
        rewritten("no markers", "new")


def test_captions_for_a_folder_are_measured_beside_one_at_a_time(tmp_path):
    options = [
        "--size",
        "tiny",
        "--images",
        "3",
        "--new-tokens",
        "3",
        "--slots",
        "2",
        "--rounds",
        "1",
        "--device",
        "cpu",
    ]
    folders = ["--models", str(tmp_path / "models"), "--out", str(tmp_path)]
    assert bench.main(["caption", *options, "--precision", "int8", *folders]) == 0
    one, together = read_rows(tmp_path, "caption")
    assert (one["contestant"], together["contestant"]) == ("one at a time", "mmllm caption")
    assert together["images_per_minute"] == pytest.approx(60 * 3 / together["seconds"][0])
    assert "| int8 | mmllm caption, 2 at once | 3 | 3 |" in tables(tmp_path)


def test_make_bench_ends_with_the_tables():
    recipe = (ROOT / "Makefile").read_text().partition("\nbench:")[2].partition("\n\n")[0]
    commands = [part.split()[0] for part in recipe.split("benchmarks ")[1:]]
    assert commands == ["train", "generate", "caption", "memory", "table"]


def test_the_tables_hold_every_goal():
    shown = tables(ROOT / "benchmarks")
    for goal in (*bench_train.GOALS, *bench_generate.GOALS, *bench_caption.GOALS):
        if goal.device == "cpu":
            assert f"| {goal.text} |" in shown


def test_the_tables_of_the_page_are_those_of_the_rows():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert rewritten(text, tables(ROOT / "benchmarks")) == text, "run: python -m benchmarks table"


def test_help_answers_without_torch():
    program = (
        "import sys; from benchmarks import __main__ as bench; bench.parse(['train']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_a_server_under_load_loses_and_mixes_no_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_load, "REFUSALS", 20)
    monkeypatch.setattr(bench_load, "JOBS", 12)
    with bench_load.started("tiny", tmp_path) as server:
        assert bench.main(["load", "--url", server.url, "--requests", "40", "--out", str(tmp_path)]) == 0
    answers, times = read_rows(tmp_path, "load")
    assert (answers["lost"], answers["mixed"]) == (0, 0) and answers["different_answers"] == 12
    assert all(times[goal.field] > 0 for goal in bench_load.GOALS if goal.row[0] == bench_load.TIMES)
