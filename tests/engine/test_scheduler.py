"""Who runs when, and that nobody's tokens or blocks suffer for it."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_engine import (
    FakeRunner,
    blocks_of,
    drain,
    fake_engine,
    greedy,
    noisy_rule,
)
from helpers_weights import refused
from qspec_llm.engine.engine import MAX_GAMMA, Engine
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.request import Request
from qspec_llm.kv.blocks import BLOCK_SIZE, blocks_for

VOCABULARY = 50
RULE = noisy_rule(VOCABULARY)


def make(**options) -> tuple[Engine, FakeRunner]:
    return fake_engine(RULE, VOCABULARY, **options)


def running(engine: Engine) -> list[int]:
    return [request.request_id for request in engine.scheduler.running]


def waiting(engine: Engine) -> list[int]:
    return [request.request_id for request in engine.scheduler.waiting]


def alone(prompt, params, gamma: int = 0) -> list[int]:
    engine, _ = make(gamma=gamma)
    request = engine.add(prompt, params)
    drain(engine)
    return request.output


def check(engine: Engine) -> None:
    """What holds between any two steps."""
    scheduler, blocks = engine.scheduler, blocks_of(engine)
    held = Counter(block for request in scheduler.running for block in request.blocks)
    assert len(held) + blocks.num_free == blocks.num_blocks
    assert all(blocks.count(block) == number for block, number in held.items())
    for request in scheduler.running:
        assert not request.is_finished
        assert 0 <= request.committed < request.num_tokens <= request.max_total
        assert blocks_for(request.committed) <= len(request.blocks)
        # what may still be written belongs to one request alone
        assert all(held[block] == 1 for block in request.blocks[request.committed // BLOCK_SIZE :])
    for request in scheduler.waiting:
        assert not request.is_finished
        assert (request.blocks, request.committed) == ([], 0)


# Admission


def test_first_come_first_served():
    engine, _ = make(max_batch=2)
    requests = [engine.add([1], greedy(length)) for length in (30, 5, 5, 5)]
    order: list[int] = []
    while engine.has_work:
        finished = [e.request_id for e in engine.step() if e.finish_reason]
        order += finished
        assert len(running(engine)) <= 2
    assert order[-1] == 0
    assert [each for each in order if each] == [1, 2, 3]
    assert all(request.finish_reason == "length" for request in requests)


def test_a_large_request_is_not_passed_by_a_small_one():
    engine, _ = make(num_blocks=4, gamma=0)
    engine.add([1] * 30, greedy(10))
    engine.add([1] * 40, greedy(10))
    engine.add([1], greedy(2))
    engine.step()
    assert (running(engine), waiting(engine)) == ([0], [1, 2])
    drain(engine)


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_no_more_than_max_batch_run(max_batch):
    engine, runner = make(max_batch=max_batch)
    for length in range(1, 12):
        engine.add([length], greedy(length))
    drain(engine)
    assert max(runner.batch_sizes) == max_batch


def test_requests_join_and_leave_while_others_run():
    engine, _ = make(max_batch=4)
    prompts = [[index, index + 1] for index in range(9)]
    requests: list[Request] = []
    for prompt in prompts:
        requests.append(engine.add(prompt, greedy(11)))
        engine.step()
        check(engine)
    drain(engine)
    assert [request.output for request in requests] == [alone(p, greedy(11)) for p in prompts]


def test_an_idle_engine_does_nothing():
    engine, _ = make()
    assert not engine.has_work
    assert engine.step() == []


# Chunked prefill


@pytest.mark.parametrize("length", [1, 16, 17, 18, 33, 100])
def test_a_long_prompt_is_processed_in_chunks(length):
    engine, runner = make(max_batch=1, max_rows=1)
    prompt = [index % VOCABULARY for index in range(length)]
    request = engine.add(prompt, greedy(9))
    watermarks = [0]
    while not request.output:
        engine.step()
        watermarks.append(request.committed)
    chunk = MAX_GAMMA + 1  # the smallest budget that an engine of one request has
    assert watermarks == [*range(0, length, chunk), length]
    assert max(runner.rows_per_verify) <= chunk
    drain(engine)
    assert request.output == alone(prompt, greedy(9))


def test_the_row_budget_is_shared_and_no_draft_is_shortened():
    engine, runner = make(max_batch=4, max_rows=1, gamma=MAX_GAMMA)
    requests = [engine.add([index] * 100, greedy(40)) for index in range(6)]
    drain(engine)
    assert max(runner.rows_per_verify) <= 4 * (MAX_GAMMA + 1)
    for request in requests:
        single, _ = make(max_batch=1, gamma=MAX_GAMMA)
        same = single.add(request.prompt, greedy(40))
        drain(single)
        assert request.output == same.output
        assert (request.num_cycles, request.num_drafted) == (same.num_cycles, same.num_drafted)


def test_a_long_prompt_never_stops_an_answer():
    engine, runner = make(max_batch=3, max_rows=1, gamma=2, num_blocks=200)
    young = [engine.add([index], greedy(60)) for index in range(2)]
    engine.step()
    long = engine.add([7] * 600, greedy(5))
    engine.scheduler.running.insert(0, engine.scheduler.waiting.pop())  # as if it had come first
    while not long.output:
        before = [len(request.output) for request in young]
        engine.step()
        for request, number in zip(young, before, strict=True):
            assert request.is_finished or len(request.output) > number
        assert runner.rows_per_verify[-1] <= 3 * (MAX_GAMMA + 1)
    drain(engine)
    assert long.output == alone(long.prompt, greedy(5))


# Preemption


def test_the_youngest_is_preempted_and_comes_back_first():
    engine, _ = make(num_blocks=5, gamma=0, max_batch=4)
    old = engine.add([1] * 16, greedy(50))
    young = engine.add([2] * 16, greedy(40))
    late = engine.add([3] * 16, greedy(3))
    while young.committed or not young.output:
        engine.step()
        check(engine)
    assert running(engine)[0] == old.request_id
    assert waiting(engine)[:2] == [young.request_id, late.request_id][: len(waiting(engine))]
    assert old.committed > 0
    drain(engine)
    for request in (old, young, late):
        assert request.output == alone(request.prompt, request.params)


@pytest.mark.parametrize("gamma", [0, 3, 6])
def test_preemption_costs_no_token_and_no_statistic(gamma):
    prompts = [[index] * (5 * index + 1) for index in range(6)]
    figures = []
    for num_blocks in (100, 8):
        engine, _ = make(num_blocks=num_blocks, gamma=gamma)
        requests = [engine.add(prompt, greedy(60)) for prompt in prompts]
        drain(engine)
        figures.append([(r.output, r.num_cycles, r.num_drafted, r.num_accepted) for r in requests])
    assert figures[0] == figures[1]


def test_one_request_may_fill_the_whole_cache():
    for gamma in (0, 5):
        engine, _ = make(num_blocks=3, gamma=gamma)
        request = engine.add([1] * 10, greedy(1000))
        other = engine.add([2] * 40, greedy(1000))
        drain(engine)
        assert request.num_tokens == other.num_tokens == 3 * BLOCK_SIZE
        assert request.finish_reason == "length"


# The watermark


def test_the_watermark_moves_only_by_what_was_verified():
    engine, _ = make(gamma=4, max_batch=2)
    request = engine.add([1, 2, 3], greedy(40))
    engine.add([4], greedy(40))
    before = request.committed
    while not request.is_finished:
        num_before = request.num_tokens
        engine.step()
        moved = request.committed - before
        assert moved >= 1
        if not request.is_finished:
            # all known tokens but the newest are final
            assert request.committed == request.num_tokens - 1
            assert moved == (request.num_tokens - num_before) if before else 3
        before = request.committed
    drain(engine)


@pytest.mark.parametrize("gamma", [0, 1, 7])
def test_gamma_tokens_are_drafted_where_there_is_room(gamma):
    engine, _ = make(gamma=gamma)
    request = engine.add([1], greedy(30))
    drain(engine)
    assert request.num_drafted <= gamma * request.num_cycles
    assert request.num_drafted >= gamma * (request.num_cycles - gamma - 1)
    assert request.num_cycles + request.num_accepted == len(request.output)
    last = engine.add([1], greedy(1))  # the first token comes from the prompt: nothing to draft
    drain(engine)
    assert (last.num_cycles, last.num_drafted) == (1, 0)


# Abort


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_abort(num_steps):
    engine, _ = make(max_batch=2, gamma=2)
    requests = [engine.add([index, 1], greedy(40)) for index in range(4)]
    for _ in range(num_steps):
        engine.step()
    for victim in (requests[0], requests[3]):  # running (or first in line) and waiting
        assert engine.abort(victim.request_id) is victim
        assert victim.finish_reason == "abort"
        assert victim.blocks == []
        assert engine.abort(victim.request_id) is None
        if num_steps:
            check(engine)
    emissions = drain(engine)
    assert {emission.request_id for emission in emissions} == {1, 2}
    for request in requests[1:3]:
        assert request.output == alone(request.prompt, greedy(40))


def test_aborting_what_finished_or_never_was_does_nothing():
    engine, _ = make()
    request = engine.add([1], greedy(3))
    drain(engine)
    assert engine.abort(request.request_id) is None
    assert request.finish_reason == "length"
    assert engine.abort(99) is None


def test_aborting_everything_leaves_an_idle_engine():
    engine, _ = make(max_batch=2)
    requests = [engine.add([1] * 20, greedy(40)) for _ in range(5)]
    for _ in range(3):
        engine.step()
    for request in requests:
        engine.abort(request.request_id)
    assert not engine.has_work
    blocks_of(engine).check_idle()


# What is refused


def test_an_empty_prompt_is_refused():
    engine, _ = make()
    with refused("prompt is empty"):
        engine.add([], greedy(1))
    assert not engine.has_work


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_a_token_outside_the_vocabulary_is_refused(token):
    engine, _ = make()
    with refused("vocabulary", VOCABULARY):
        engine.add([1, token, 2], greedy(1))
    assert not engine.has_work


def test_the_refusal_names_the_offending_token():
    engine, _ = make()
    with refused(777):
        engine.add([1, 777, 2], greedy(1))


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers():
    engine, _ = make(num_blocks=2, context_length=1000)
    with refused(32, "KV cache"):
        engine.add([1] * 32, greedy(1))
    with refused(50, 32, "KV cache"):
        engine.add([1] * 50, greedy(1))
    engine, _ = make(num_blocks=64, context_length=20)
    with refused(21, 20, "context"):
        engine.add([1] * 21, greedy(1))
    assert not engine.has_work


def test_the_longest_prompt_that_fits_gives_one_token():
    engine, _ = make(num_blocks=2, gamma=4)
    request = engine.add([1] * 31, greedy(9))
    drain(engine)
    assert (len(request.output), request.finish_reason) == (1, "length")


# Everything at once


def stress(seed: int, num_actions: int) -> None:
    """Random adds, aborts and steps with little room; every output is that of a plain run."""
    rng = random.Random(seed)
    num_blocks, max_batch = rng.randint(2, 9), rng.randint(1, 5)
    engine, _ = make(
        num_blocks=num_blocks,
        max_batch=max_batch,
        max_rows=rng.choice([1, 40, 512]),
        gamma=rng.randint(0, 6),
        eos_token_ids=(rng.randrange(VOCABULARY),),
    )
    requests: list[Request] = []
    for _ in range(num_actions):
        action = rng.random()
        if action < 0.3:
            length = rng.randint(1, num_blocks * BLOCK_SIZE - 1)
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, length]))]
            params = greedy(
                rng.randint(1, 50), ignore_eos=rng.random() < 0.5, min_tokens=rng.randint(0, 1)
            )
            requests.append(engine.add(prompt, params, gamma=rng.choice([None, 0, 3, MAX_GAMMA])))
        elif action < 0.36 and requests:
            engine.abort(rng.choice(requests).request_id)
        else:
            engine.step()
        check(engine)
    drain(engine)
    for request in requests:
        assert request.is_finished
        engine, _ = make(gamma=0, num_blocks=num_blocks)
        same = engine.add(request.prompt, request.params)
        same.stop_ids = request.stop_ids
        drain(engine)
        assert request.output == same.output[: len(request.output)]
        assert request.finish_reason == "abort" or request.output == same.output


@pytest.mark.parametrize("seed", range(12))
def test_random_adds_aborts_and_steps(seed):
    stress(seed, 80)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1000, 1150))
def test_random_adds_aborts_and_steps_for_longer(seed):
    stress(seed, 250)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 47), st.integers(1, 30)), min_size=1, max_size=6),
    num_blocks=st.integers(3, 8),
    gamma=st.integers(0, 6),
)
def test_any_mix_of_lengths_is_finished_and_equal_to_plain(lengths, num_blocks, gamma):
    engine, _ = make(num_blocks=num_blocks, gamma=gamma)
    requests = [
        engine.add([length % VOCABULARY] * length, greedy(num_tokens))
        for length, num_tokens in lengths
    ]
    drain(engine)
    for request in requests:
        single, _ = make(num_blocks=num_blocks, gamma=0)
        same = single.add(request.prompt, request.params)
        drain(single)
        assert request.output == same.output


def test_sampled_requests_under_pressure_equal_those_with_room():
    outputs = []
    for num_blocks in (200, 5):
        engine, _ = make(num_blocks=num_blocks, gamma=3)
        requests = [
            engine.add([index] * 9, SamplingParams(max_tokens=50, seed=index, top_p=0.9))
            for index in range(6)
        ]
        drain(engine)
        outputs.append([request.output for request in requests])
    assert outputs[0] == outputs[1]


# The fake runner's own checks


def test_the_fake_runner_notices_a_verifier_that_keeps_the_drafts_kv():
    class Careless(FakeRunner):
        def forward(self, batch, view):
            before = dict(self.slots)
            logits = super().forward(batch, view)
            if not view.is_draft:  # as if verify had not written
                self.slots = before | {s: e for s, e in self.slots.items() if s not in before}
            return logits

    engine, _ = make(gamma=3)
    engine._runner = Careless(RULE, VOCABULARY)
    engine.add([1, 2], greedy(20))
    with pytest.raises(AssertionError, match="verify saw"):
        drain(engine)
