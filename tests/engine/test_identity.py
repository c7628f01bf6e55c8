"""The product: speculative output equals plain output, token for token and logit for logit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers_engine import (
    DRAFT,
    ByteTokenizer,
    RecordingRunner,
    Run,
    assert_identical,
    drain,
    greedy,
    ragged_prompts,
    run_model,
    same_bits,
    tiny_decoder,
)
from qspec_llm.engine.engine import Engine
from qspec_llm.engine.params import SamplingParams
from qspec_llm.kernels import BACKENDS, LayerKV, Rows, available_backends, reference
from qspec_llm.kv.blocks import BLOCK_SIZE
from qspec_llm.llm import LLM
from qspec_llm.model.decoder import Decoder
from qspec_llm.weights.quantize import Target
from qspec_llm.weights.view import VERIFY, Activation, View, draft_view

NUM_TOKENS = 6
VOCABULARY = 97


@pytest.fixture(scope="module")
def decoders(backend: str) -> dict[Target, Decoder]:
    return {target: tiny_decoder(target, backend=backend) for target in Target}


@pytest.fixture(scope="module")
def plain(decoders: dict[Target, Decoder]) -> dict[Target, Run]:
    """Eight requests of each target decoded plainly, in one batch."""
    prompts = ragged_prompts(8, VOCABULARY)
    return {t: run_model(decoder, prompts, greedy(NUM_TOKENS)) for t, decoder in decoders.items()}


def first(run: Run, num_requests: int) -> Run:
    return Run(run.tokens[:num_requests], run.logits[:num_requests], run.requests[:num_requests])


@pytest.mark.parametrize("gamma", range(7))
@pytest.mark.parametrize("draft", Activation)
@pytest.mark.parametrize("target", Target)
def test_speculation_changes_nothing(target, draft, gamma, decoders, plain):
    for batch in range(1, 9):
        prompts = ragged_prompts(batch, VOCABULARY)
        run = run_model(
            decoders[target], prompts, greedy(NUM_TOKENS), gamma=gamma, view=draft_view(draft)
        )
        assert_identical(run, first(plain[target], batch))


@pytest.mark.parametrize("draft", Activation)
@pytest.mark.parametrize("backend_name", ["reference", "cpu"])
@pytest.mark.parametrize("change", [{"hadamard": 64}, {"outliers": 32}], ids=str)
def test_speculation_changes_nothing_in_a_changed_model(change, backend_name, draft):
    if backend_name not in available_backends():
        pytest.skip(f"backend {backend_name!r} does not run here")
    fields = {**change, "head_draft": Activation.A8}
    decoder = tiny_decoder(Target.INT4, backend=backend_name, **fields)
    prompts = ragged_prompts(8, VOCABULARY)
    plain = run_model(decoder, prompts, greedy(NUM_TOKENS))
    for gamma in (1, 3, 6):
        for batch in (1, 3, 8):
            run = run_model(
                decoder, prompts[:batch], greedy(NUM_TOKENS), gamma=gamma, view=draft_view(draft)
            )
            assert_identical(run, first(plain, batch))
    unchanged = run_model(tiny_decoder(Target.INT4, backend=backend_name), prompts, greedy(2))
    # a rotation changes sums; outliers (here of weights in any order) nothing but an a4 draft
    assert same_bits(plain.logits[0][:2], unchanged.logits[0]) is ("outliers" in change)


@pytest.mark.parametrize(
    ("target", "num_shared"), [(Target.BF16, 128), (Target.INT8, 128), (Target.INT4, 64)]
)
def test_speculation_changes_nothing_in_larger_groups(target, num_shared, backend):
    """A scale for 128 activations where weights have groups of 128 and are not the draft's own."""
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_heads": 2, "num_kv_heads": 1}
    decoder = tiny_decoder(target, backend=backend, group=128, head_dim=128, **sizes)
    assert decoder.draft_group == num_shared
    prompts = ragged_prompts(8, VOCABULARY)
    plain = run_model(decoder, prompts, greedy(NUM_TOKENS))
    for gamma in (1, 4):
        for batch in (1, 3, 8):
            run = run_model(decoder, prompts[:batch], greedy(NUM_TOKENS), gamma=gamma)
            assert_identical(run, first(plain, batch))


@pytest.mark.parametrize("target", Target)
def test_the_matrix_above_meets_accepted_and_rejected_drafts(target, decoders):
    prompts = ragged_prompts(8, VOCABULARY)
    run = run_model(decoders[target], prompts, greedy(24), gamma=3, view=draft_view(Activation.A4))
    assert run.num_accepted > 20
    assert run.num_rejected > 20


@pytest.mark.parametrize("gamma", [0, 3])
@pytest.mark.parametrize("target", Target)
def test_alone_equals_in_a_batch(target, gamma, decoders, plain):
    for index, prompt in enumerate(ragged_prompts(8, VOCABULARY)):
        alone = run_model(decoders[target], [prompt], greedy(NUM_TOKENS), gamma=gamma)
        assert alone.tokens[0] == plain[target].tokens[index]
        assert same_bits(alone.logits[0], plain[target].logits[index])


@pytest.mark.parametrize("target", Target)
def test_gammas_mix_in_one_batch(target, decoders, plain):
    prompts = ragged_prompts(8, VOCABULARY)
    gammas = [0, 6, 1, 3, 16, 2, 0, 5]
    assert_identical(
        run_model(decoders[target], prompts, greedy(NUM_TOKENS), gamma=gammas), plain[target]
    )


@pytest.mark.parametrize("max_batch", [1, 2, 3])
@pytest.mark.parametrize("gamma", [0, 4])
def test_chunking_of_prompts_changes_nothing(max_batch, gamma, decoders):
    # max_rows is raised to max_batch * 17, so small batches make small chunks
    prompts = [*ragged_prompts(8, VOCABULARY), list(range(90))]
    decoder = decoders[Target.BF16]
    whole = run_model(decoder, prompts, greedy(NUM_TOKENS), max_batch=9)
    chunked = run_model(
        decoder, prompts, greedy(NUM_TOKENS), gamma=gamma, max_batch=max_batch, max_rows=1
    )
    assert_identical(chunked, whole)


class CountingEngineRunner(RecordingRunner):
    """Also counts requests whose watermark fell: those that were preempted."""

    def __init__(self, decoder: Decoder, num_blocks: int) -> None:
        super().__init__(decoder, num_blocks)
        self.num_recomputed = 0
        self._starts: dict[int, int] = {}

    def forward(self, batch, view):
        if view == VERIFY:
            for span in batch.spans:
                before = self._starts.get(span.request.request_id, 0)
                self.num_recomputed += span.start < before
                self._starts[span.request.request_id] = span.start
        return super().forward(batch, view)


@pytest.mark.parametrize("gamma", [0, 3, 6])
@pytest.mark.parametrize("target", Target)
def test_preemption_and_recomputation_change_nothing(target, gamma, decoders):
    prompts = [prompt[:40] for prompt in ragged_prompts(8, VOCABULARY)]
    params = greedy(40)
    plenty = run_model(decoders[target], prompts, params)

    runner = CountingEngineRunner(decoders[target], 12)
    engine = Engine(runner, ByteTokenizer(), DRAFT, gamma=gamma, max_batch=8)
    requests = [engine.add(prompt, params) for prompt in prompts]
    drain(engine)
    assert runner.num_recomputed > 3
    for request, tokens, logits in zip(requests, plenty.tokens, plenty.logits, strict=True):
        assert request.output == tokens
        kept = range(len(request.prompt) - 1, request.num_tokens - 1)
        rows = torch.stack([runner.logits[request.request_id, position] for position in kept])
        assert same_bits(rows, logits)


@pytest.mark.parametrize("gamma", [0, 3])
def test_a_seeded_request_samples_the_same_alone_in_a_batch_and_preempted(gamma, decoders):
    decoder, prompts = decoders[Target.INT8], ragged_prompts(8, VOCABULARY)
    prompts = [prompt[:40] for prompt in prompts]
    params = [SamplingParams(max_tokens=30, seed=seed, top_p=0.95) for seed in range(8)]
    batch = run_model(decoder, prompts, params, gamma=gamma)
    cramped = run_model(decoder, prompts, params, gamma=gamma, num_blocks=10)
    assert_identical(cramped, batch)
    for index, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        alone = run_model(decoder, [prompt], each, gamma=gamma)
        assert alone.tokens[0] == batch.tokens[index]
        assert same_bits(alone.logits[0], batch.logits[index])
    assert len({tuple(tokens) for tokens in batch.tokens}) == 8


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families_are_identical_too(family, backend):
    decoder = tiny_decoder(Target.BF16, backend=backend, family=family, tied_head=True)
    prompts = ragged_prompts(8, VOCABULARY)
    plain = run_model(decoder, prompts, greedy(NUM_TOKENS))
    assert_identical(run_model(decoder, prompts, greedy(NUM_TOKENS), gamma=3), plain)


def test_penalties_keep_gammas_identical(decoders):
    params = greedy(
        20, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4, min_tokens=5
    )
    prompts, decoder = ragged_prompts(4, VOCABULARY), decoders[Target.INT8]
    plain = run_model(decoder, prompts, params)
    assert plain.tokens != run_model(decoder, prompts, greedy(20)).tokens
    for gamma in (1, 4):
        assert_identical(run_model(decoder, prompts, params, gamma=gamma), plain)


# The draft's KV


class VerifyKeepsDraftKV:
    """The reference kernels, but the verify view leaves generated positions as they are."""

    def __getattr__(self, name: str) -> object:
        return getattr(reference, name)

    def write_kv(self, keys: Tensor, values: Tensor, kv: LayerKV, view: View, rows: Rows) -> None:
        if view != VERIFY or rows.is_prompt:
            reference.write_kv(keys, values, kv, view, rows)


def committed_kv(decoder: Decoder, gamma: int, num_committed: int) -> list[Tensor]:
    """K and V of one request's first positions, [positions, KV heads, D] for each layer."""
    runner = RecordingRunner(decoder, 16)
    engine = Engine(runner, ByteTokenizer(), DRAFT, gamma=gamma, max_batch=2)
    request = engine.add([5, 6, 7], greedy(200))
    engine.add([8] * 20, greedy(200))
    while request.committed < num_committed:
        engine.step()
    slots = torch.tensor(
        [
            request.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
            for p in range(num_committed)
        ]
    )

    return [tensor[slots] for layer in runner.kv for tensor in (layer.keys, layer.values)]


def differs(left: list[Tensor], right: list[Tensor]) -> bool:
    return not all(same_bits(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("target", Target)
def test_committed_kv_is_the_verifiers_bit_for_bit(target, decoders):
    plain = committed_kv(decoders[target], 0, 40)
    for gamma in (1, 3, 6):
        assert not differs(committed_kv(decoders[target], gamma, 40), plain)


@pytest.mark.parametrize("target", Target)
def test_a_verifier_that_keeps_the_drafts_kv_is_caught(target):
    whole = tiny_decoder(target)
    broken = replace(whole, ops=VerifyKeepsDraftKV())
    assert differs(committed_kv(broken, 3, 40), committed_kv(whole, 0, 40))
    prompts = ragged_prompts(4, VOCABULARY)
    with pytest.raises(AssertionError):
        assert_identical(
            run_model(broken, prompts, greedy(30), gamma=3),
            run_model(whole, prompts, greedy(30)),
        )


def test_the_draft_writes_kv_of_its_own(decoders):
    """Otherwise the two tests above would hold for nothing."""
    runner = RecordingRunner(decoders[Target.BF16], 4)
    engine = Engine(runner, ByteTokenizer(), DRAFT, gamma=3, max_batch=1)
    written: list[bool] = []
    forward = runner.forward

    def watch(batch, view):
        if view == VERIFY:
            return forward(batch, view)
        before = runner.kv[0].keys.clone()
        logits = forward(batch, view)
        written.append(not torch.equal(before, runner.kv[0].keys))
        return logits

    runner.forward = watch
    engine.add([1, 2, 3], greedy(10))
    drain(engine)
    assert written
    assert all(written)


# The real model

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
]


# The slow reference proves itself on one target; fast backends run all.
CASES = [
    pytest.param((name, target), marks=[pytest.mark.gpu] if name == "cuda" else [])
    for name in BACKENDS
    for target in Target
    if name != "reference"
]


@pytest.fixture(scope="module", params=[*CASES, ("reference", Target.BF16)], ids=str)
def llm(request: pytest.FixtureRequest) -> LLM:
    backend, target = request.param
    if backend not in available_backends():
        pytest.skip(f"backend {backend!r} does not run here")
    return LLM("smollm2", target=target.value, backend=backend, max_tokens_in_kv=1024)


# Greedy agreement of an a8 draft with its own verifier, measured on 8 prompts x 96 tokens (README);
# re-quantised to 4 bits the draft of a 135M model agrees in 0.7 or so of the cases.
AGREEMENT = {Target.INT4: 0.97, Target.INT8: 0.73, Target.BF16: 0.73}


@pytest.mark.weights
def test_smollm2_is_identical_and_agrees_as_measured(llm):
    num_prompts, num_tokens = (3, 16) if llm.config.backend == "reference" else (4, 64)
    prompts = [llm.encode(text) for text in PROMPTS[:num_prompts]]
    plain = run_model(llm.decoder, prompts, greedy(num_tokens))
    drafted = run_model(
        llm.decoder, prompts, greedy(num_tokens), gamma=3, view=llm.config.draft_view
    )
    assert_identical(drafted, plain)
    num_tested = drafted.num_accepted + drafted.num_rejected
    assert num_tested > 20
    # Processors round differently, so each writes texts of its own: a sample, with a sample's luck.
    expected = AGREEMENT[llm.config.target]
    deviation = (expected * (1 - expected) / num_tested) ** 0.5
    assert drafted.num_accepted / num_tested >= expected - 3 * deviation


@pytest.mark.weights
@pytest.mark.soak
def test_smollm2_is_identical_with_several_threads(llm):
    """The suite runs on one thread; users do not."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        prompts = [llm.encode(text) for text in PROMPTS]
        plain = run_model(llm.decoder, prompts, greedy(24))
        for gamma in (2, 3):
            drafted = run_model(
                llm.decoder, prompts, greedy(24), gamma=gamma, view=llm.config.draft_view
            )
            assert_identical(drafted, plain)
        alone = run_model(llm.decoder, prompts[:1], greedy(24), gamma=3)
        assert_identical(alone, first(plain, 1))
    finally:
        torch.set_num_threads(num_threads)
