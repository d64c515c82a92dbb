"""The choice of a token: each option against transformers' own processors on random logits."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mmllm.errors import UserError
from mmllm.inference.request import GenerationConfig
from mmllm.inference.sampling import (
    NOT_FINITE,
    SamplerState,
    choose,
    draw,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    filtered,
    penalise_repetition,
    penalised,
)

CPU = torch.device("cpu")
STOP_IDS = [95, 96]


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randn(6, 97, generator=torch.Generator().manual_seed(0)) * 3


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("top_k", [1, 2, 50, 96, 97, 500])
def test_top_k_keeps_what_transformers_keeps(scores, top_k):
    assert_close(filter_top_k(scores, [top_k] * 6), TopKLogitsWarper(top_k)(None, scores))


def test_every_row_has_its_own_top_k(scores):
    sizes = [1, 0, 50, 3, 97, 500]
    got = filter_top_k(scores, sizes)
    for row, size in enumerate(sizes):
        wanted = TopKLogitsWarper(size or 97)(None, scores[row : row + 1])
        assert_close(got[row : row + 1], wanted)


def test_tokens_that_tie_with_the_last_of_the_top_k_stay():
    for size, kept in ((2, [True, True, True, False]), (1, [True, False, False, False])):
        assert filter_top_k(torch.tensor([[3.0, 2.0, 2.0, 1.0]]), [size]).isfinite().tolist() == [kept]
    assert filter_top_k(torch.tensor([[3.0, 3.0, 2.0]]), [1]).isfinite().tolist() == [[True, True, False]]


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.8, 0.95, 0.9999])
def test_top_p_keeps_what_transformers_keeps(scores, top_p):
    assert_close(filter_top_p(scores, column(*[top_p] * 6)), TopPLogitsWarper(top_p)(None, scores))


@pytest.mark.parametrize("top_p", [0.3, 0.9])
@pytest.mark.parametrize("spread", [8.0, 1.0, 0.01])
def test_top_p_of_a_vocabulary_that_is_sorted_in_part(top_p, spread):
    """A peaked row needs few of its 5,000 tokens, a flat one most of them; both in one batch."""
    scores = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[spread], [8.0], [spread]]
    )
    assert_close(filter_top_p(scores, column(*[top_p] * 3)), TopPLogitsWarper(top_p)(None, scores))


def test_top_p_keeps_the_token_that_crosses_the_line():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = {p: int(filter_top_p(scores, column(p)).isfinite().sum()) for p in (0.49, 0.51, 0.79, 0.81, 0.9999)}
    assert kept == {0.49: 1, 0.51: 2, 0.79: 2, 0.81: 3, 0.9999: 4}


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(scores, min_p):
    assert_close(filter_min_p(scores, column(*[min_p] * 6)), MinPLogitsWarper(min_p)(None, scores))


def test_min_p_is_relative_to_the_likeliest_token():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = {p: int(filter_min_p(scores, column(p)).isfinite().sum()) for p in (0.0, 0.3, 0.59, 0.61)}
    assert kept == {0.0: 4, 0.3: 3, 0.59: 2, 0.61: 1}


def test_the_repetition_penalty_is_that_of_transformers(scores):
    ids = torch.randint(0, 97, (6, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(6, 97, dtype=torch.bool).scatter(1, ids, True)
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(ids, scores.clone())
    assert_close(penalise_repetition(scores, seen, 1.3), wanted)


def test_the_penalty_of_a_seen_token_depends_on_its_sign():
    seen = torch.tensor([[True, True, False, True]])
    assert_close(
        penalise_repetition(torch.tensor([[2.0, -2.0, 1.0, 0.0]]), seen, 1.3), torch.tensor([[2 / 1.3, -2.6, 1.0, 0.0]])
    )


MIXED = [
    GenerationConfig(),
    GenerationConfig(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1, seed=1),  # Qwen's own
    GenerationConfig(repetition_penalty=1.4),
    GenerationConfig(temperature=1.5, min_p=0.05, seed=2),
    GenerationConfig(temperature=0.3, top_k=3, seed=3),
    GenerationConfig(temperature=2.0, top_p=0.5, seed=4),
    GenerationConfig(temperature=1.0, seed=5, repetition_penalty=0.8),
]


def test_rows_of_one_batch_have_their_own_options_and_each_keeps_what_transformers_keeps():
    rng = torch.Generator().manual_seed(6)
    logits = torch.randn(7, 97, generator=rng) * 2
    prompts = torch.randint(0, 97, (7, 9), generator=rng)
    rows = [SamplerState(config, tuple(ids.tolist()), 97, CPU) for config, ids in zip(MIXED, prompts, strict=True)]
    scores = penalised(logits, rows, STOP_IDS)
    sampled = [i for i, config in enumerate(MIXED) if not config.is_greedy]
    scores[sampled] = filtered(scores[sampled], [MIXED[i] for i in sampled])
    for row, config in enumerate(MIXED):
        steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(config.repetition_penalty)])
        if not config.is_greedy:
            steps += [TemperatureLogitsWarper(config.temperature), TopKLogitsWarper(config.top_k or 97)]
            steps += [TopPLogitsWarper(config.top_p), MinPLogitsWarper(config.min_p)]
        assert_close(scores[row : row + 1], steps(prompts[row : row + 1], logits[row : row + 1].clone()))


def test_a_row_draws_the_same_in_any_batch(scores):
    def draws(rows: list[int]) -> list[int]:
        states = [SamplerState(MIXED[i], (1, 2), 97, CPU) for i in rows]
        return [choose(scores[rows], states, STOP_IDS)[rows.index(3)] for _ in range(12)]

    assert draws([3]) == draws([1, 3, 5]) == draws([5, 4, 3, 2, 1, 0])


def test_a_penalised_token_is_remembered_from_step_to_step():
    row = SamplerState(GenerationConfig(repetition_penalty=2.0), (), 4, CPU)
    logits = torch.tensor([[1.0, 0.9, 0.8, -5.0]])
    assert [choose(logits, [row], [3])[0] for _ in range(4)] == [0, 1, 2, 0]


def test_the_end_token_is_not_chosen_before_min_new_tokens():
    rows = [SamplerState(GenerationConfig(min_new_tokens=least), (), 4, CPU) for least in (0, 2)]
    logits = torch.tensor([[0.0, 1.0, 5.0, 4.0]]).expand(2, -1)
    assert [choose(logits, rows, [2, 3]) for _ in range(3)] == [[2, 1], [2, 1], [2, 2]]


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_marked_and_the_others_choose(scores, fault):
    scores[[1, 4], [20, 3]] = fault
    rows = [SamplerState(MIXED[i], (), 97, CPU) for i in (0, 1, 2, 3, 5, 0)]
    clean = choose(scores.nan_to_num(0.0, 0.0), [SamplerState(row.config, (), 97, CPU) for row in rows], STOP_IDS)
    chosen = choose(scores, rows, STOP_IDS)
    assert chosen[1] == chosen[4] == NOT_FINITE
    assert [chosen[i] for i in (0, 2, 3, 5)] == [clean[i] for i in (0, 2, 3, 5)]


def test_draws_follow_the_probabilities():
    rng = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    tokens = draw(torch.tensor([[0.5, 0.0, 0.3, 0.2]]).expand(20000, -1), rng)
    assert_close(tokens.bincount() / 20000, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=0.01, rtol=0)


def test_a_draw_never_takes_a_token_of_probability_zero():
    probabilities = torch.tensor([[0.0, 1.0, 0.0]]).expand(3, -1)
    rng = torch.tensor([0.0, 0.5, 1 - 2**-32], dtype=torch.float64)
    assert draw(probabilities, rng).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "field, value",
    [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", math.inf), ("top_k", -5), ("top_p", 0.0),
     ("top_p", 2.0), ("min_p", -0.1), ("min_p", 1.5), ("num_beams", 0), ("seed", -1), ("seed", 2**63),
     ("repetition_penalty", 0.0), ("length_penalty", math.nan), ("early_stopping", "always"),
     ("num_return_sequences", 2), ("min_new_tokens", 101), ("stop", "x"), ("stop", ("",)), ("stop", ("x",) * 17)],
)  # fmt: skip
def test_an_option_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"^{field} is "):
        GenerationConfig(**{field: value})


@pytest.mark.parametrize("others", [{"temperature": 0.5}, {"stop": ("x",)}])
def test_beam_search_neither_samples_nor_takes_stop_strings(others):
    with pytest.raises(UserError, match="^num_beams 2 with "):
        GenerationConfig(num_beams=2, **others)
