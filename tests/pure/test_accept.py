"""The acceptance rule and the draw, as pure functions of distributions and draws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from qspec_llm.engine.accept import accept_greedy, accept_sampled
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.random import Stream, uniform
from qspec_llm.engine.sampling import pick, probabilities

ALPHA = 1e-3  # draws are seeded: a right rule passes always


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


# Greedy


@pytest.mark.parametrize(
    ("draft", "target", "num_accepted"),
    [
        ([], [4], 0),
        ([1, 2, 3], [1, 2, 3, 9], 3),
        ([1, 2, 3], [1, 5, 3, 9], 1),
        ([1, 2, 3], [0, 2, 3, 9], 0),
        ([7], [7, 7], 1),
    ],
)
def test_greedy_counts_up_to_the_first_difference(draft, target, num_accepted):
    assert accept_greedy(draft, target) == (num_accepted)


# pick


def test_a_draw_at_an_edge_takes_the_token_above_it():
    probs = tensor(0.25, 0, 0.5, 0.25, 0).expand(5, -1)
    draws = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-32], dtype=torch.float64)
    assert pick(probs, draws).tolist() == [0, 2, 2, 3, 3]


def test_zeros_at_the_start_are_passed_over():
    probs = tensor(0, 0, 1e-30, 0)[None]
    assert pick(probs, torch.zeros(1, dtype=torch.float64)).tolist() == [2]
    assert pick(probs, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [2]


@given(
    weights=st.lists(
        st.one_of(st.just(0.0), st.floats(2**-126, 2**100, width=32)), min_size=1
    ).filter(any),
    draw=st.one_of(st.sampled_from([0.0, 2**-32, 1 - 2**-32, 1 - 2**-53]), st.floats(0, 1)),
)
def test_a_token_of_probability_zero_is_never_picked(weights, draw):
    draw = min(draw, 1 - 2**-53)
    token = int(pick(tensor(*weights)[None], torch.tensor([draw], dtype=torch.float64)))
    assert 0 <= token < len(weights)
    assert weights[token] > 0


def test_pick_follows_the_distribution():
    probs = tensor(0.05, 0.0, 0.45, 0.2, 0.3)
    draws = uniform(3, 0, torch.arange(100_000), Stream.RESIDUAL)
    counts = torch.bincount(pick(probs.expand(len(draws), -1), draws), minlength=5)
    assert counts[1] == 0
    kept = probs > 0
    assert stats.chisquare(counts[kept], probs[kept].double() * len(draws)).pvalue > ALPHA


# probabilities, against a plain reading of its options


def plain_probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """Temperature, min-p, top-k, top-p in this order, one token at a time."""
    top = max(logits)
    probs = [math.exp((value - top) / params.temperature) for value in logits]
    probs = [value / sum(probs) for value in probs]
    limit = params.min_p * max(probs)
    probs = [value if value >= limit else 0.0 for value in probs]
    if params.top_k:
        limit = sorted(probs, reverse=True)[min(params.top_k, len(probs)) - 1]
        probs = [value if value >= limit else 0.0 for value in probs]
    if params.top_p < 1:
        total, kept = sum(probs), 0.0
        for index in sorted(range(len(probs)), key=lambda i: -probs[i]):
            is_out = kept >= params.top_p * total
            kept += probs[index]
            if is_out:
                probs[index] = 0.0
    return [value / sum(probs) for value in probs]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.05])
@pytest.mark.parametrize("top_k", [0, 1, 4, 100])
@pytest.mark.parametrize("min_p", [0.0, 0.2, 1.0])
def test_probabilities_are_those_of_the_plain_reading(temperature, top_p, top_k, min_p):
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(2)) * 2
    got = probabilities(logits, params)
    for row, values in zip(got.tolist(), logits.tolist(), strict=True):
        expected = plain_probabilities(values, params)
        assert row == pytest.approx(expected, abs=1e-6)
        assert [value > 0 for value in row] == [value > 0 for value in expected]


def test_a_masked_token_has_probability_zero():
    probs = probabilities(tensor(0, -torch.inf, 1)[None], SamplingParams(top_p=0.99, min_p=0.01))
    assert probs[0, 1] == 0
    assert torch.isfinite(probs).all()


# Speculative sampling

UNIFORM = tensor(0.2, 0.2, 0.2, 0.2, 0.2)
PEAKED = tensor(0.9, 0.05, 0.03, 0.02, 0.0)
OPPOSED = tensor(0.0, 0.02, 0.03, 0.05, 0.9)
LOW, HIGH = tensor(0.5, 0.5, 0, 0, 0), tensor(0, 0, 0.3, 0.3, 0.4)
PAIRS = {
    "equal": (PEAKED, PEAKED),
    "nearly equal": (PEAKED * 0.9 + UNIFORM * 0.1, PEAKED),
    "draft too sure": (PEAKED, UNIFORM),
    "draft unsure": (UNIFORM, PEAKED),
    "opposed": (OPPOSED, PEAKED),
    "disjoint": (LOW, HIGH),
}


def speculate(draft: Tensor, target: Tensor, num_calls: int, gamma: int, rule=accept_sampled):
    """Tokens [num_calls at least] from `gamma` drafts a call, with one law at all positions."""
    positions = torch.arange(num_calls * (gamma + 1)).view(num_calls, gamma + 1)
    draws = {
        stream: uniform(11, 0, positions.flatten(), stream).view(positions.shape)
        for stream in Stream
    }
    drafted = pick(
        draft.expand(num_calls * gamma, -1), draws[Stream.PROPOSAL][:, :gamma].flatten()
    ).view(num_calls, gamma)
    draft_probs, target_probs = draft.expand(gamma, -1), target.expand(gamma + 1, -1)
    tokens: list[int] = []
    for row in range(num_calls):
        num_accepted, last = rule(
            drafted[row],
            draft_probs,
            target_probs,
            draws[Stream.ACCEPT][row, :gamma],
            draws[Stream.RESIDUAL][row],
        )
        tokens += [*drafted[row, :num_accepted].tolist(), last]
    return torch.tensor(tokens)


def p_value(tokens: Tensor, target: Tensor) -> float:
    """How likely such counts are under the target; 0 where it forbids a token that came."""
    counts = torch.bincount(tokens, minlength=len(target)).double()
    kept = target > 0
    if counts[~kept].any():
        return 0.0
    expected = target.double() / target.double().sum() * len(tokens)
    return float(stats.chisquare(counts[kept], expected[kept]).pvalue)


@pytest.mark.parametrize("name", PAIRS)
def test_output_has_the_targets_distribution(name):
    draft, target = PAIRS[name]
    tokens = torch.cat(
        [speculate(draft, target, num_calls, gamma) for gamma, num_calls in ((1, 6000), (4, 6000))]
    )
    assert len(tokens) >= 12_000
    assert p_value(tokens, target) > ALPHA


@pytest.mark.soak
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("gamma", [1, 2, 6])
def test_output_has_the_targets_distribution_over_many_calls(name, gamma):
    draft, target = PAIRS[name]
    assert p_value(speculate(draft, target, 20_000, gamma), target) > ALPHA


def test_1e5_tokens_have_the_targets_distribution():
    draft, target = PAIRS["nearly equal"]
    tokens = speculate(draft, target, 16_000, 8)
    assert len(tokens) > 100_000
    assert p_value(tokens, target) > ALPHA


def always_accept(draft_tokens, draft_probs, target_probs, accept_draws, residual_draws):
    return len(draft_tokens), int(pick(target_probs[-1:], residual_draws[-1:]))


def no_residual(draft_tokens, draft_probs, target_probs, accept_draws, residual_draws):
    """Draws from the target itself after a rejection."""
    return accept_sampled(
        draft_tokens,
        draft_probs,
        target_probs,
        accept_draws,
        residual_draws,
    )[0], int(pick(target_probs[:1], residual_draws[:1]))


def swapped(draft_tokens, draft_probs, target_probs, accept_draws, residual_draws):
    """Takes the draft's distribution for the target's and the other way round."""
    target_for_draft = torch.cat((draft_probs, target_probs[-1:]))
    return accept_sampled(
        draft_tokens, target_probs[:-1], target_for_draft, accept_draws, residual_draws
    )


def one_draw_for_all(draft_tokens, draft_probs, target_probs, accept_draws, residual_draws):
    """Uses the acceptance draw for the residual too: streams that are not independent."""
    draws = torch.cat((accept_draws, residual_draws[-1:]))
    return accept_sampled(draft_tokens, draft_probs, target_probs, accept_draws, draws)


@pytest.mark.parametrize("rule", [always_accept, no_residual, swapped, one_draw_for_all])
def test_the_chi_square_test_has_power(rule):
    draft, target = tensor(0.1, 0.1, 0.2, 0.2, 0.4), tensor(0.4, 0.3, 0.15, 0.1, 0.05)
    assert p_value(speculate(draft, target, 3000, 2), target) > ALPHA
    assert p_value(speculate(draft, target, 3000, 2, rule), target) < 1e-9


def test_acceptance_rate_is_the_overlap():
    """P(accept) = sum of min(target, draft) (Leviathan et al., corollary 3.6)."""
    draft, target = tensor(0.5, 0.3, 0.2, 0, 0), tensor(0.1, 0.4, 0.2, 0.3, 0)
    overlap = float(torch.minimum(draft, target).sum())
    num_calls = 6000
    num_tokens = len(speculate(draft, target, num_calls, 1))
    rate = num_tokens / num_calls - 1
    assert rate == pytest.approx(overlap, abs=4 * math.sqrt(overlap * (1 - overlap) / num_calls))


def test_two_tokens_have_the_targets_joint_distribution():
    """Each token's law depends on the one before, for draft and target differently."""
    generator = torch.Generator().manual_seed(5)
    draft_law = torch.rand(5, 4, generator=generator).square()  # row 4 decides the first token
    target_law = torch.rand(5, 4, generator=generator).square()
    draft_law, target_law = (law / law.sum(-1, keepdim=True) for law in (draft_law, target_law))
    num_calls = 12_000
    positions = torch.arange(3 * num_calls)
    draws = {s: uniform(9, 0, positions, s).view(num_calls, 3) for s in Stream}
    first = pick(draft_law[4].expand(num_calls, -1), draws[Stream.PROPOSAL][:, 0])
    second = pick(draft_law[first], draws[Stream.PROPOSAL][:, 1])
    counts = torch.zeros(4, 4, dtype=torch.float64)
    for row in range(num_calls):
        drafted = torch.stack((first[row], second[row]))
        before = torch.cat((torch.tensor([4]), drafted))
        num_accepted, last = accept_sampled(
            drafted,
            draft_law[before[:2]],
            target_law[before],
            draws[Stream.ACCEPT][row, :2],
            draws[Stream.RESIDUAL][row],
        )
        tokens = [*drafted[:num_accepted].tolist(), last]
        if len(tokens) == 1:  # the next cycle draws it; here plainly
            draw = draws[Stream.RESIDUAL][row, 2:]
            tokens.append(int(pick(target_law[last][None], draw)))
        counts[tokens[0], tokens[1]] += 1
    expected = target_law[4].double()[:, None] * target_law[:4].double() * num_calls
    expected *= num_calls / expected.sum()
    assert stats.chisquare(counts.flatten(), expected.flatten()).pvalue > ALPHA


def test_a_token_that_the_target_forbids_never_stands():
    num_accepted, last = accept_sampled(
        torch.tensor([0, 1]),
        LOW.expand(2, -1),
        HIGH.expand(3, -1),
        torch.zeros(2, dtype=torch.float64),  # the luckiest draw there is
        torch.zeros(3, dtype=torch.float64),
    )
    assert num_accepted == 0
    assert last == 2


def test_equal_distributions_accept_even_the_unluckiest_draw():
    num_accepted, _ = accept_sampled(
        torch.tensor([0, 0]),
        PEAKED.expand(2, -1),
        PEAKED.expand(3, -1),
        torch.full((2,), 1 - 2**-32, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
    )
    assert num_accepted == 2


def test_without_drafts_it_is_a_plain_draw():
    empty = torch.empty(0, dtype=torch.int64)
    draw = torch.tensor([0.96], dtype=torch.float64)
    assert accept_sampled(empty, PEAKED[None][:0], PEAKED[None], draw[:0], draw) == (0, 2)


@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
def test_top_p_of_a_large_vocabulary_is_that_of_a_stable_sort(top_p, spread):
    """Few levels, so that many probabilities are equal, at the boundary too; 0.0: all of them."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randint(-6, 1, (3, 3000), generator=generator) * spread
    probs = torch.softmax(logits.float(), -1)
    ranked, order = (probs / probs.sum(-1, keepdim=True)).sort(dim=-1, descending=True, stable=True)
    is_out = ranked.cumsum(-1) - ranked >= top_p
    expected = torch.zeros_like(is_out).scatter(-1, order, ~is_out)
    kept = probabilities(logits.float(), SamplingParams(temperature=1, top_p=top_p)) > 0
    assert torch.equal(kept, expected)
