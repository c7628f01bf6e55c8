"""Cycles as captured graphs, launched one ahead: the same tokens as step by step."""

from collections.abc import Sequence

import pytest

from helpers_engine import (
    DRAFT,
    ByteTokenizer,
    blocks_of,
    drain,
    greedy,
    ragged_prompts,
    tiny_decoder,
)
from qspec_llm.bench.decode import decode
from qspec_llm.engine.engine import Engine, Gamma
from qspec_llm.engine.graphs import graphs_of
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.request import Request
from qspec_llm.engine.runner import Runner
from qspec_llm.kernels import available_backends
from qspec_llm.kv.pool import allocate
from qspec_llm.model.decoder import Decoder
from qspec_llm.weights.quantize import Target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in available_backends(), reason="no GPU that can run it"),
]

VOCABULARY = 97


# The second has layers that take one kernel (kernels/cuda/persistent.py) where a row is alone.
DECODERS = [(Target.BF16, {}), (Target.INT4, {"head_dim": 64, "intermediate_size": 192})]


@pytest.fixture(scope="module", params=DECODERS, ids=["bf16", "int4"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    target, sizes = request.param
    return tiny_decoder(target, backend="cuda", **sizes)


def engine_of(
    decoder: Decoder, *, graphs: bool, num_blocks: int = 64, max_batch: int = 4, gamma: Gamma = 0
) -> Engine:
    kv = allocate(decoder.config, num_blocks, decoder.dtype, decoder.ops.device)
    return Engine(
        Runner(decoder, kv),
        ByteTokenizer(),
        DRAFT,
        gamma=gamma,
        max_batch=max_batch,
        graphs=graphs_of(decoder, kv, DRAFT, max_batch) if graphs else None,
    )


def run(
    decoder: Decoder,
    params: SamplingParams | Sequence[SamplingParams],
    gammas: Sequence[int],
    *,
    graphs: bool,
    num_blocks: int = 64,
    max_batch: int = 4,
) -> list[Request]:
    engine = engine_of(decoder, graphs=graphs, num_blocks=num_blocks, max_batch=max_batch)
    options = [params] * len(gammas) if isinstance(params, SamplingParams) else params
    prompts = ragged_prompts(len(gammas), VOCABULARY)
    requests = [
        engine.add(prompt, each, gamma=gamma)
        for prompt, each, gamma in zip(prompts, options, gammas, strict=True)
    ]
    drain(engine)
    return requests


def tokens(requests: Sequence[Request]) -> list[list[int]]:
    return [request.output for request in requests]


def counts(requests: Sequence[Request]) -> list[tuple[int, ...]]:
    return [(r.num_cycles, r.num_drafted, r.num_tested, r.num_accepted) for r in requests]


@pytest.mark.parametrize("gamma", [0, 1, 3])
def test_graphs_give_the_tokens_and_counts_of_single_steps(decoder: Decoder, gamma: int) -> None:
    expected = run(decoder, greedy(30), [gamma] * 4, graphs=False)
    actual = run(decoder, greedy(30), [gamma] * 4, graphs=True)
    assert tokens(actual) == tokens(expected)
    assert counts(actual) == counts(expected)
    if gamma:
        accepted, tested = sum(r.num_accepted for r in actual), sum(r.num_tested for r in actual)
        assert 0 < accepted <= tested
        # drafts of int4 read the same weights: so small a model may find all of them right
        assert accepted < tested or decoder.draft_bytes == decoder.stored_bytes


def test_engines_that_are_compared_answer_alike(decoder: Decoder) -> None:
    """They take turns, and each launches cycles ahead."""
    result = decode(
        lambda gamma: engine_of(decoder, graphs=True, gamma=gamma),
        ragged_prompts(3, VOCABULARY),
        greedy(12),
        gamma=3,
    )
    assert result.identical
    assert result.acceptance_rate is not None


def test_gammas_mix_and_requests_come_and_go(decoder: Decoder) -> None:
    params = [greedy(n) for n in (5, 30, 1, 17, 40, 8)]
    gammas = [2, 0, 3, 1, 4, 2]
    expected = run(decoder, params, gammas, graphs=False, max_batch=3)
    actual = run(decoder, params, gammas, graphs=True, max_batch=3)
    assert tokens(actual) == tokens(expected)
    assert counts(actual) == counts(expected)


def test_too_few_blocks_for_what_is_launched_ahead(decoder: Decoder) -> None:
    expected = run(decoder, greedy(40), [2] * 4, graphs=False)
    for num_blocks in (9, 12):
        cramped = run(decoder, greedy(40), [2] * 4, graphs=True, num_blocks=num_blocks)
        assert tokens(cramped) == tokens(expected)


def test_options_that_graphs_lack_are_served_beside_them(decoder: Decoder) -> None:
    params = [greedy(20), greedy(20, repetition_penalty=1.3), greedy(20, logprobs=2), greedy(20)]
    expected = run(decoder, params, [2, 2, 0, 0], graphs=False)
    actual = run(decoder, params, [2, 2, 0, 0], graphs=True)
    assert tokens(actual) == tokens(expected)
    assert tokens(actual)[1] != tokens(run(decoder, greedy(20), [2] * 4, graphs=True))[1]


def test_stop_tokens_end_an_answer_that_was_launched_further(decoder: Decoder) -> None:
    plain = run(decoder, greedy(20), [2] * 3, graphs=False)
    stop = plain[1].output[6]
    expected = run(decoder, greedy(20, stop_token_ids=(stop,)), [2] * 3, graphs=False)
    actual = run(decoder, greedy(20, stop_token_ids=(stop,)), [2] * 3, graphs=True)
    assert tokens(actual) == tokens(expected)
    assert len(actual[1].output) < 20


def test_an_aborted_request_leaves_the_others_as_they_are(decoder: Decoder) -> None:
    expected = run(decoder, greedy(25), [2] * 3, graphs=False)
    engine = engine_of(decoder, graphs=True)
    requests = [engine.add(p, greedy(25), gamma=2) for p in ragged_prompts(3, VOCABULARY)]
    for _ in range(4):
        engine.step()
    engine.abort(requests[1].request_id)
    drain(engine)
    assert [requests[0].output, requests[2].output] == [expected[0].output, expected[2].output]
    blocks_of(engine).check_idle()


SAMPLED = [
    SamplingParams(max_tokens=20, seed=1),
    SamplingParams(max_tokens=20, seed=2, temperature=0.7, top_p=0.9),
    SamplingParams(max_tokens=20, seed=3, top_k=5, min_p=0.05),
    greedy(20),
]


@pytest.mark.parametrize("gamma", [0, 2])
def test_seeded_requests_draw_the_tokens_of_single_steps(decoder: Decoder, gamma: int) -> None:
    expected = run(decoder, SAMPLED, [gamma] * 4, graphs=False)
    actual = run(decoder, SAMPLED, [gamma] * 4, graphs=True)
    assert tokens(actual) == tokens(expected)
    assert counts(actual) == counts(expected)


def test_a_seeded_request_draws_the_same_in_any_company(decoder: Decoder) -> None:
    together = run(decoder, SAMPLED, [2] * 4, graphs=True)
    cramped = run(decoder, SAMPLED, [2] * 4, graphs=True, num_blocks=9)
    assert tokens(cramped) == tokens(together)
    by_two = run(decoder, SAMPLED, [2] * 4, graphs=True, max_batch=2)
    assert tokens(by_two) == tokens(together)
