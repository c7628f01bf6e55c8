"""Blocks that were computed before: found where they hold the very bits, and only there."""

import pytest
import torch

from helpers_engine import (
    ByteTokenizer,
    RecordingRunner,
    blocks_of,
    drain,
    fake_engine,
    greedy,
    noisy_rule,
    run_model,
    same_bits,
    tiny_decoder,
)
from qspec_llm.engine.engine import Engine
from qspec_llm.engine.params import SamplingParams
from qspec_llm.kv.blocks import BLOCK_SIZE
from qspec_llm.weights.quantize import Target
from qspec_llm.weights.view import Activation, draft_view

VOCABULARY = 50
RULE = noisy_rule(VOCABULARY)
PROMPT = [index * 7 % VOCABULARY for index in range(3 * BLOCK_SIZE + 5)]


def make(**options):
    return fake_engine(RULE, VOCABULARY, **options)


def finish(engine, prompt, params=None, **options):
    request = engine.add(prompt, params or greedy(6), **options)
    drain(engine)
    return request


def test_a_prompt_seen_before_is_not_computed_again():
    engine, runner = make(gamma=2)
    first = finish(engine, PROMPT)
    runner.rows_per_verify.clear()
    second = finish(engine, PROMPT)
    assert (first.num_cached, second.num_cached) == (0, 3 * BLOCK_SIZE)
    assert runner.rows_per_verify[0] == 5
    assert second.output == first.output


def test_a_prompt_of_whole_blocks_keeps_its_last_one_to_compute():
    engine, _ = make()
    prompt = PROMPT[: 2 * BLOCK_SIZE]
    finish(engine, prompt)
    assert finish(engine, prompt).num_cached == BLOCK_SIZE


def test_prompts_share_what_they_have_in_common():
    engine, _ = make()
    finish(engine, PROMPT)
    other = [*PROMPT[: BLOCK_SIZE + 3], 49, *PROMPT[BLOCK_SIZE + 4 :]]
    assert finish(engine, other).num_cached == BLOCK_SIZE


def test_the_same_block_after_other_tokens_is_another_block():
    engine, _ = make()
    block = PROMPT[:BLOCK_SIZE]
    finish(engine, [*block, *block, 1])
    assert finish(engine, [*[3] * BLOCK_SIZE, *block, 1]).num_cached == 0


def test_an_answer_in_the_next_prompt_is_computed_by_prompt_kernels():
    """The conversation of a chat: decode kernels wrote the answer's KV."""
    engine, _ = make(gamma=3)
    first = finish(engine, PROMPT, greedy(5 * BLOCK_SIZE))
    again = [*PROMPT, *first.output, 1, 2, 3]
    second = finish(engine, again)  # the fake runner checks who wrote what each row sees
    assert second.num_cached == 3 * BLOCK_SIZE
    assert second.output == finish(make()[0], again).output


def test_an_answer_is_found_by_a_request_that_generates_the_same():
    """Preempted requests come back this way."""
    engine, runner = make(num_blocks=9, gamma=2, max_batch=2)
    requests = [engine.add([index] * 20, greedy(80)) for index in range(2)]
    drain(engine)
    num_rows = sum(runner.rows_per_verify)
    plenty, spacious = make(num_blocks=64, gamma=2, max_batch=2)
    same = [plenty.add([index] * 20, greedy(80)) for index in range(2)]
    drain(plenty)
    assert [r.output for r in requests] == [r.output for r in same]
    assert num_rows < sum(spacious.rows_per_verify) + 100


def test_completions_of_one_prompt_compute_it_once():
    engine, runner = make(max_batch=8)
    requests = [engine.add(PROMPT, greedy(5), sample=index) for index in range(8)]
    drain(engine)
    assert sum(request.num_cached for request in requests) == 7 * 3 * BLOCK_SIZE
    assert runner.rows_per_verify[0] == len(PROMPT)
    assert len({tuple(request.output) for request in requests}) == 1


def test_salts_separate():
    engine, _ = make()
    finish(engine, PROMPT, salt=b"a")
    assert finish(engine, PROMPT, salt=b"b").num_cached == 0
    assert finish(engine, PROMPT, salt=b"a").num_cached == 3 * BLOCK_SIZE


def test_the_least_recently_used_is_evicted_first():
    engine, _ = make(num_blocks=10, max_batch=1)
    prompts = [[seed] * (2 * BLOCK_SIZE + 1) for seed in range(4)]
    for prompt in prompts:
        finish(engine, prompt, greedy(2))  # 3 blocks each, 2 of them published
    finish(engine, prompts[0], greedy(2))
    finish(engine, [9] * (5 * BLOCK_SIZE), greedy(2))
    assert blocks_of(engine).num_evicted > 0
    assert finish(engine, prompts[0], greedy(2)).num_cached > 0
    assert finish(engine, prompts[1], greedy(2)).num_cached == 0


def test_an_evicted_prefix_is_computed_again_and_nothing_is_wrong():
    engine, _ = make(num_blocks=6, max_batch=2, gamma=3)
    prompts = [[seed, *PROMPT[: 2 * BLOCK_SIZE + seed]] for seed in range(5)]
    expected = [finish(make()[0], prompt, greedy(20)).output for prompt in prompts]
    for _ in range(3):
        requests = [engine.add(prompt, greedy(20)) for prompt in prompts]
        drain(engine)
        assert [request.output for request in requests] == expected


def test_a_request_that_was_aborted_leaves_what_it_finished():
    engine, _ = make(max_batch=1, max_rows=1)
    request = engine.add(PROMPT, greedy(5))
    while request.committed < 2 * BLOCK_SIZE:
        engine.step()
    engine.abort(request.request_id)
    assert finish(engine, PROMPT).num_cached == 2 * BLOCK_SIZE


# Real kernels: the very bits


@pytest.mark.parametrize("gamma", [0, 3])
@pytest.mark.parametrize("target", [Target.INT4, Target.BF16])
def test_logits_after_a_cached_prefix_are_the_same_bits(target, gamma, backend):
    decoder = tiny_decoder(target, backend=backend)
    generator = torch.Generator().manual_seed(3)
    system = torch.randint(97, (70,), generator=generator).tolist()
    view = draft_view(Activation.A8)
    runner = RecordingRunner(decoder, 40)
    engine = Engine(runner, ByteTokenizer(), view, gamma=gamma, max_batch=4)
    prompts = [[*system, *tail] for tail in ([1], [2, 3], list(range(40)), [1, 5])]
    first = finish(engine, prompts[0], greedy(30))
    prompts.append([*prompts[0], *first.output, 4])
    requests = [engine.add(prompt, greedy(30)) for prompt in prompts]
    drain(engine)
    assert all(request.num_cached >= 64 for request in requests)
    for prompt, request in zip(prompts, requests, strict=True):
        alone = run_model(decoder, [prompt], greedy(30))
        assert request.output == alone.tokens[0]
        kept = range(len(prompt) - 1, request.num_tokens - 1)
        logits = torch.stack([runner.logits[request.request_id, position] for position in kept])
        assert same_bits(logits, alone.logits[0])


# Prompt log-probabilities


@pytest.mark.parametrize("max_rows", [1, 512])
def test_prompt_logprobs_are_those_of_every_prompt_token(max_rows):
    engine, _ = make(max_batch=1, max_rows=max_rows)
    params = greedy(4, prompt_logprobs=3, logprobs=2)
    request = finish(engine, PROMPT, params)
    assert len(request.prompt_logprobs) == len(PROMPT) - 1
    for index, entry in enumerate(request.prompt_logprobs, 1):
        table = torch.log_softmax(RULE(False, PROMPT[:index]).double(), dim=-1)
        assert entry.token_id == PROMPT[index]
        assert entry.logprob == pytest.approx(float(table[PROMPT[index]]))
        assert entry.top[0][0] == int(table.argmax())
        assert len(entry.top) == 3
    assert request.output == finish(engine, PROMPT, greedy(4)).output
    assert finish(engine, PROMPT, params).num_cached == 0
    assert len(request.logprobs) == 4


def test_prompt_logprobs_survive_preemption():
    engine, _ = make(num_blocks=8, max_batch=3, max_rows=1)
    old = engine.add([1] * 20, greedy(90))
    young = engine.add(PROMPT[:40], greedy(20, prompt_logprobs=0))
    other = engine.add(PROMPT[:45], greedy(20, prompt_logprobs=0))
    drain(engine)
    for request in (young, other):
        assert [e.token_id for e in request.prompt_logprobs] == list(request.prompt[1:])
    assert old.finish_reason == "length"


def test_a_prompt_of_one_token_has_no_logprobs():
    engine, _ = make()
    assert finish(engine, [1], greedy(2, prompt_logprobs=1)).prompt_logprobs == []


# logit_bias


def test_logit_bias_moves_both_views():
    engine, _ = make(gamma=3)
    request = finish(engine, [1, 2], greedy(30, logit_bias={7: 100}))
    assert request.output == [7] * 30
    assert request.num_accepted == request.num_tested > 0
    banned = finish(engine, [1, 2], greedy(30, logit_bias=dict.fromkeys(range(49), -100)))
    assert banned.output == [49] * 30


def test_logit_bias_keeps_gammas_identical():
    params = SamplingParams(temperature=0, max_tokens=40, logit_bias={3: 2.5, 4: -3.0})
    outputs = [finish(make(gamma=gamma)[0], [1], params).output for gamma in (0, 1, 5)]
    assert outputs[0] == outputs[1] == outputs[2]
