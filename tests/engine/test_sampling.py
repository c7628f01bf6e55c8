"""Sampling through the whole engine: the output follows the verify view, whatever the draft."""

from collections.abc import Sequence

import pytest
import torch
from scipy import stats
from torch import Tensor

from helpers_engine import DRAFT, FakeRunner, PieceTokenizer, drain, fake_engine, noisy_rule
from qspec_llm.engine.engine import Engine
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.sampling import probabilities

ALPHA = 1e-3  # draws are seeded: a right engine passes always
VOCABULARY = 6
TARGET = torch.tensor([2.0, 1.5, 1.0, 0.0, -0.5, -1.5])
DRAFTS = {
    "close": torch.tensor([1.8, 1.7, 0.8, 0.3, -0.6, -1.0]),
    "opposed": -TARGET,
    "disjoint": torch.tensor([-50.0, -50.0, -50.0, -50.0, -50.0, 50.0]),
    "equal": TARGET,
}
FEW = [chr(ord("a") + index) for index in range(VOCABULARY)]


def fixed_rule(draft: Tensor, target: Tensor):
    return lambda is_draft, tokens: draft if is_draft else target


def sample(rule, params: SamplingParams, *, gamma: int, num_requests: int) -> list[list[int]]:
    """Outputs of several completions, the `sample` number their key."""
    engine, _ = fake_engine(rule, VOCABULARY, gamma=gamma, pieces=FEW, num_blocks=1024)
    requests = [engine.add([0], params, sample=index) for index in range(num_requests)]
    drain(engine)
    return [request.output for request in requests]


def p_value(tokens: Sequence[int], law: Tensor) -> float:
    """How likely such counts are under a law; 0 where it forbids a token that came."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(law)).double()
    if counts[law == 0].any():
        return 0.0
    expected = law.double() / law.double().sum() * len(tokens)
    is_rare = expected < 5  # too few for the chi-square distribution: one cell for them all
    cells = [torch.cat((x[~is_rare], x[is_rare].sum()[None])) for x in (counts, expected)]
    kept = cells[1] > 0
    return float(stats.chisquare(cells[0][kept], cells[1][kept]).pvalue)


OPTIONS = [
    {"temperature": 0.5},
    {"temperature": 1.0},
    {"temperature": 2.0},
    {"temperature": 0.5, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 2.0, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 2.0, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize(
    ("draft", "options"),
    [("opposed", options) for options in OPTIONS]
    + [(draft, OPTIONS[i]) for draft in ("close", "disjoint", "equal") for i in (1, 4, 8)],
    ids=str,
)
def test_output_has_the_verifiers_distribution(draft, options):
    params = SamplingParams(max_tokens=63, seed=17, **options)
    outputs = sample(fixed_rule(DRAFTS[draft], TARGET), params, gamma=3, num_requests=16)
    tokens = [token for output in outputs for token in output]
    law = probabilities(TARGET[None], params)[0]
    assert p_value(tokens, law) > ALPHA
    if draft in ("opposed", "disjoint"):  # the test can tell draft from verify
        assert p_value(tokens, probabilities(DRAFTS[draft][None], params)[0]) < 1e-6


@pytest.mark.soak
@pytest.mark.parametrize("options", [OPTIONS[i] for i in (1, 4, 8)], ids=str)
@pytest.mark.parametrize("draft", ["opposed", "disjoint"])
def test_output_has_the_verifiers_distribution_over_1e5_draws(draft, options):
    params = SamplingParams(max_tokens=100, seed=18, **options)
    outputs = sample(fixed_rule(DRAFTS[draft], TARGET), params, gamma=4, num_requests=1000)
    law = probabilities(TARGET[None], params)[0]
    assert p_value([token for output in outputs for token in output], law) > ALPHA


@pytest.mark.parametrize("gamma", [0, 1, 5])
def test_every_gamma_has_the_same_distribution(gamma):
    params = SamplingParams(max_tokens=60, seed=5)
    outputs = sample(fixed_rule(DRAFTS["close"], TARGET), params, gamma=gamma, num_requests=16)
    law = probabilities(TARGET[None], params)[0]
    assert p_value([token for output in outputs for token in output], law) > ALPHA


@pytest.mark.parametrize("gamma", [2, 4])
def test_each_token_follows_the_one_before(gamma):
    """A chain whose draft has other transitions: every row of transitions is the verifier's."""
    tables = torch.randn(2, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))

    def rule(is_draft: bool, tokens: Sequence[int]) -> Tensor:
        return tables[int(is_draft), tokens[-1]]

    params = SamplingParams(max_tokens=60, seed=23)
    pairs = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    for output in sample(rule, params, gamma=gamma, num_requests=30):
        for before, after in zip([0, *output], output, strict=False):
            pairs[before, after] += 1
    expected = probabilities(tables[0], params).double() * pairs.sum(-1, keepdim=True)
    statistic = ((pairs - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(float(statistic), VOCABULARY * (VOCABULARY - 1)) > ALPHA
    wrong = probabilities(tables[1], params).double() * pairs.sum(-1, keepdim=True)
    statistic = ((pairs - wrong) ** 2 / wrong).sum()
    assert stats.chi2.sf(float(statistic), VOCABULARY * (VOCABULARY - 1)) < 1e-9


def test_the_first_two_tokens_have_the_verifiers_joint_distribution():
    tables = torch.randn(2, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(4))

    def rule(is_draft: bool, tokens: Sequence[int]) -> Tensor:
        return tables[int(is_draft), (3 * tokens[-1] + len(tokens)) % VOCABULARY]

    # of four tokens, the second and third: both are drafted in one cycle
    params = SamplingParams(max_tokens=4, seed=29)
    outputs = sample(rule, params, gamma=3, num_requests=1000)
    cells = [VOCABULARY * output[1] + output[2] for output in outputs]
    laws = probabilities(tables[0], params)
    first = laws[(3 * 0 + 1) % VOCABULARY]
    joint = torch.zeros(VOCABULARY, VOCABULARY)
    for a in range(VOCABULARY):
        second = laws[(3 * a + 2) % VOCABULARY]
        for b in range(VOCABULARY):
            joint[b] += first[a] * second[b] * laws[(3 * b + 3) % VOCABULARY]
    assert p_value(cells, joint.flatten()) > ALPHA


def test_an_engine_that_accepts_always_is_caught(monkeypatch):
    def always(draft_tokens, draft_probs, target_probs, accept_draws, residual_draws):
        return len(draft_tokens), int(target_probs[-1].argmax())

    monkeypatch.setattr("qspec_llm.engine.accept.accept_sampled", always)
    params = SamplingParams(max_tokens=200, seed=17)
    outputs = sample(fixed_rule(torch.zeros(6), TARGET), params, gamma=3, num_requests=4)
    law = probabilities(TARGET[None], params)[0]
    assert p_value([token for output in outputs for token in output], law) < 1e-6


# Seeds


def complete(jobs, *, gamma: int = 3, num_blocks: int = 256, max_batch: int = 8):
    """Outputs of (prompt, params, sample) jobs in one batch."""
    rule = noisy_rule(50)
    engine, _ = fake_engine(rule, 50, gamma=gamma, num_blocks=num_blocks, max_batch=max_batch)
    requests = [engine.add(prompt, params, sample=index) for prompt, params, index in jobs]
    drain(engine)
    return [request.output for request in requests]


@pytest.mark.parametrize("gamma", [0, 3])
def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_without_room(gamma):
    jobs = [
        ([index] * (1 + 7 * index), SamplingParams(max_tokens=40, seed=index), 0)
        for index in range(6)
    ]
    together = complete(jobs, gamma=gamma)
    assert complete(jobs, gamma=gamma, num_blocks=6) == together
    assert complete(jobs[::-1], gamma=gamma, max_batch=2) == together[::-1]
    assert [complete([job], gamma=gamma)[0] for job in jobs] == together


def test_completions_of_one_prompt_differ():
    params = SamplingParams(max_tokens=20, seed=1, n=5)
    outputs = complete([([1, 2], params, index) for index in range(5)])
    assert len({tuple(output) for output in outputs}) == 5


def test_without_a_seed_every_request_draws_one_of_its_own():
    jobs = [([1, 2], SamplingParams(max_tokens=20), 0)] * 3
    assert len({tuple(output) for output in complete(jobs)}) == 3


def test_a_given_seed_goes_before_that_of_the_parameters():
    engine, _ = fake_engine(noisy_rule(50), 50)
    params = SamplingParams(max_tokens=5, seed=1)
    assert engine.add([1], params).seed == 1
    assert engine.add([1], params, seed=2).seed == 2


def test_temperature_zero_takes_the_most_likely_token():
    rule = fixed_rule(DRAFTS["opposed"], TARGET)
    params = SamplingParams(max_tokens=10, temperature=0, seed=1, top_p=0.5, top_k=2)
    for gamma in (0, 3):
        assert sample(rule, params, gamma=gamma, num_requests=1) == [[0] * 10]


def test_top_k_of_one_is_greedy():
    params = SamplingParams(max_tokens=10, top_k=1)
    assert sample(fixed_rule(-TARGET, TARGET), params, gamma=3, num_requests=1) == [[0] * 10]


@pytest.mark.parametrize("temperature", [1e-3, 100.0])
def test_extreme_temperatures_still_give_a_distribution(temperature):
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=3)
    outputs = sample(fixed_rule(-TARGET, TARGET), params, gamma=2, num_requests=2)
    assert all(0 <= token < VOCABULARY for output in outputs for token in output)


@pytest.mark.parametrize("temperature", [1e-37, 1e-45])
def test_temperatures_beyond_float32_either_work_or_are_refused(temperature):
    try:
        params = SamplingParams(max_tokens=20, temperature=temperature, seed=3)
    except ValueError:
        return
    outputs = sample(fixed_rule(-TARGET, TARGET * 20), params, gamma=2, num_requests=2)
    assert all(0 <= token < VOCABULARY for output in outputs for token in output)


def test_a_draft_that_never_agrees_and_one_that_always_does():
    params = SamplingParams(max_tokens=40, seed=3)
    for name, expected in (("disjoint", 0), ("equal", 1)):
        runner = FakeRunner(fixed_rule(DRAFTS[name], TARGET - 50 * (TARGET == -1.5)), VOCABULARY)
        if name == "equal":
            runner = FakeRunner(fixed_rule(TARGET, TARGET), VOCABULARY)
        engine = Engine(runner, PieceTokenizer(FEW), DRAFT, gamma=3, max_batch=1)
        request = engine.add([0], params)
        drain(engine)
        assert request.num_accepted / request.num_tested == expected
