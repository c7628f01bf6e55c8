"""Tickets against the probabilities that they stand for."""

import pytest
import torch
from torch import Tensor

from qspec_llm.engine.accept import accept_sampled
from qspec_llm.engine.lottery import Options, draw, judge, tickets
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.sampling import pick, probabilities

OPTIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_p": 0.9},
    {"top_k": 5},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.5, "min_p": 0.01},
    {"top_k": 1},
    {"temperature": 0.0},
]


def options_of(params: list[SamplingParams]) -> Options:
    def column(name: str) -> Tensor:
        return torch.tensor([getattr(each, name) for each in params])

    return Options(
        column("temperature").double(), column("top_p").double(), column("min_p").double(),
        column("top_k"),
    )  # fmt: skip


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.fixture
def params() -> list[SamplingParams]:
    return [SamplingParams(**each) for each in OPTIONS]  # type: ignore[arg-type]


def test_shares_of_tickets_are_the_probabilities(params: list[SamplingParams]) -> None:
    logits = random_logits(len(params), 300)
    logits[0, 7] = logits[0, 200]
    weights = tickets(logits, options_of(params), has_filters=True)
    for row, each in enumerate(params):
        share = weights[row] / weights[row].sum()
        if each.is_greedy:
            expected = torch.zeros(300).index_fill_(0, logits[row].argmax(), 1.0)
        else:
            expected = probabilities(logits[row : row + 1], each)[0]
        # less likely ones may have no ticket
        assert torch.equal(share > 1e-9, expected > 1e-9)
        assert torch.allclose(share.float(), expected, atol=1e-6)


def test_a_line_does_not_depend_on_the_others(params: list[SamplingParams]) -> None:
    logits = random_logits(len(params), 300)
    together = tickets(logits, options_of(params), has_filters=True)
    for row, each in enumerate(params):
        has_filters = each.top_k > 0 or each.top_p < 1
        alone = tickets(logits[row : row + 1], options_of([each]), has_filters=has_filters)
        assert torch.equal(alone[0], together[row])


def test_the_first_of_several_most_likely_tokens_is_taken() -> None:
    logits = torch.zeros(1, 50)
    logits[0, [9, 30]] = 4.0
    weights = tickets(logits, options_of([SamplingParams(temperature=0)]), has_filters=False)
    assert weights.nonzero().tolist() == [[0, 9]]


def test_draws_win_in_proportion() -> None:
    weights = torch.tensor([[0, 3, 0, 5, 2, 0]]).expand(10, 6)
    assert draw(weights, torch.arange(10).double() / 10).tolist() == [1] * 3 + [3] * 5 + [4] * 2
    assert draw(weights[:1], torch.tensor([1 - 2.0**-32]).double()).tolist() == [4]


@pytest.mark.parametrize("each", OPTIONS[:-1])
def test_judge_decides_as_the_definition_does(each: dict[str, float]) -> None:
    params, rng = SamplingParams(**each), torch.Generator().manual_seed(3)  # type: ignore[arg-type]
    num_lines, gamma, size = 64, 3, 40
    target = random_logits(num_lines * (gamma + 1), size, seed=1)
    drafted = target.view(num_lines, gamma + 1, size)[:, :-1].reshape(-1, size)
    drafted = drafted + random_logits(num_lines * gamma, size, seed=2) / 3
    draft_probs = probabilities(drafted, params).view(num_lines, gamma, size)
    target_probs = probabilities(target, params).view(num_lines, gamma + 1, size)
    proposals = torch.rand(num_lines * gamma, generator=rng, dtype=torch.float64)
    tokens = pick(draft_probs.view(-1, size), proposals).view(num_lines, gamma)

    lines = options_of([params] * num_lines)
    draft_weights = tickets(drafted, lines.repeat(gamma), has_filters=True)
    assert torch.equal(draw(draft_weights, proposals), tokens.flatten())
    target_weights = tickets(target, lines.repeat(gamma + 1), has_filters=True)
    num_drafts = torch.randint(gamma + 1, (num_lines,), generator=rng)
    accept_draws = torch.rand(num_lines, gamma, generator=rng, dtype=torch.float64)
    residual_draws = torch.rand(num_lines, gamma + 1, generator=rng, dtype=torch.float64)
    num_accepted, last = judge(
        tokens,
        draft_weights.view(num_lines, gamma, size),
        target_weights.view(num_lines, gamma + 1, size),
        num_drafts,
        accept_draws,
        residual_draws,
    )
    for line, count in enumerate(num_drafts.tolist()):
        expected = accept_sampled(
            tokens[line, :count],
            draft_probs[line, :count],
            target_probs[line, : count + 1],
            accept_draws[line, :count],
            residual_draws[line, : count + 1],
        )
        assert (int(num_accepted[line]), int(last[line])) == expected
    assert 0 < int(num_accepted.sum()) < int(num_drafts.sum())
