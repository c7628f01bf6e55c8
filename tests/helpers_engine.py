"""Stand-ins for the engine's tests: a byte tokenizer, a runner without a model, a tiny model.

`FakeRunner` keeps a KV cache of (request, position, token, view) records instead of tensors and
checks the watermark on every call. `tiny_decoder` is a real decoder over random weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from qspec_llm.engine.batch import Batch
from qspec_llm.engine.emit import Emission
from qspec_llm.engine.engine import Engine
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.request import Request
from qspec_llm.engine.runner import Runner
from qspec_llm.kernels import get_backend
from qspec_llm.kv.blocks import BLOCK_SIZE, BlockAllocator
from qspec_llm.kv.pool import allocate
from qspec_llm.model.config import ModelConfig
from qspec_llm.model.decoder import Decoder
from qspec_llm.model.load import expected_shapes, load_decoder
from qspec_llm.weights.quantize import Recipe, Target
from qspec_llm.weights.view import VERIFY, Activation, View, draft_view

DRAFT = draft_view(Activation.A8)


class ByteTokenizer:
    """A token is a byte; what is not UTF-8 shows as U+FFFD. Tokens from 256 on have no text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")

    def piece(self, token_id: int) -> str | None:
        return chr(token_id) if token_id < 128 else None


class PieceTokenizer:
    """Token i is the i-th of some strings."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def encode(self, text: str) -> list[int]:
        return [self.pieces.index(character) for character in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(self.pieces[token] for token in token_ids)

    def piece(self, token_id: int) -> str | None:
        return None


# (whether it is the draft view, tokens so far) -> logits [vocabulary]
LogitsRule = Callable[[bool, Sequence[int]], Tensor]


@dataclass(frozen=True)
class _Entry:
    """What one KV slot holds."""

    position: int
    token: int
    is_prompt: bool  # which kernels computed it
    is_draft: bool


class FakeRunner:
    """A runner whose logits come from a rule over the tokens that its KV cache really holds.

    Every call checks that a row sees its own request's tokens, all written, final ones by the
    verify view and by the kernels that the request would have used, and that nothing writes below
    the watermark.
    """

    def __init__(
        self,
        rule: LogitsRule,
        vocab_size: int,
        *,
        num_blocks: int = 64,
        context_length: int = 1 << 20,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        config = SimpleNamespace(
            vocab_size=vocab_size, context_length=context_length, eos_token_ids=eos_token_ids
        )
        self.decoder = SimpleNamespace(config=config)
        self.kv = (SimpleNamespace(keys=torch.empty(num_blocks * BLOCK_SIZE, 0)),)
        self.slots: dict[int, _Entry] = {}
        self.rows_per_verify: list[int] = []
        self.batch_sizes: list[int] = []
        self._rule = rule

    def forward(self, batch: Batch, view: View) -> Tensor:
        if not view.is_draft:
            self.rows_per_verify.append(batch.num_rows)
            self.batch_sizes.append(len(batch.spans))
        logits = [torch.empty(0, self.decoder.config.vocab_size)]
        for span in batch.spans:
            request = span.request
            assert span.start >= request.committed, "a row below the watermark is written again"
            for position, token in enumerate(span.tokens, span.start):
                is_prompt = position < len(request.prompt)
                entry = _Entry(position, token, is_prompt, view.is_draft)
                self.slots[_slot(request, position)] = entry
            logits += [
                self._rule(view.is_draft, self._tokens(request, stop, view))[None]
                for stop in range(span.stop - span.num_logits + 1, span.stop + 1)
            ]
        return torch.cat(logits)

    def _tokens(self, request: Request, stop: int, view: View) -> list[int]:
        """Tokens at positions 0 .. stop - 1, read from the slots."""
        entries = [self.slots[_slot(request, position)] for position in range(stop)]
        for position, entry in enumerate(entries):
            assert entry.position == position
            assert entry.is_prompt == (position < len(request.prompt)), "kernels of the other class"
            if position < request.num_tokens:
                assert [entry.token] == list(request.tokens(position, position + 1))
            is_final = position < request.committed or not view.is_draft
            assert not (is_final and entry.is_draft), "verify saw what the draft wrote"
        return [entry.token for entry in entries]


def _slot(request: Request, position: int) -> int:
    return request.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def noisy_rule(vocab_size: int, *, seed: int = 0, noise: float = 1.0) -> LogitsRule:
    """Logits that depend on every token so far; the draft's are the target's plus noise."""
    tables = torch.randn(2, 251, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2

    def rule(is_draft: bool, tokens: Sequence[int]) -> Tensor:
        state = 1
        for token in tokens:
            state = (state * 31 + token + 7) % 1_000_003
        logits = tables[0, state % 251]
        return logits + noise * tables[1, state % 251] if is_draft else logits

    return rule


def fake_engine(
    rule: LogitsRule,
    vocab_size: int,
    *,
    gamma: int = 3,
    max_batch: int = 8,
    max_rows: int = 512,
    num_blocks: int = 64,
    context_length: int = 1 << 20,
    eos_token_ids: tuple[int, ...] = (),
    pieces: Sequence[str] | None = None,
) -> tuple[Engine, FakeRunner]:
    """An engine over a `FakeRunner`, and that runner."""
    runner = FakeRunner(
        rule,
        vocab_size,
        num_blocks=num_blocks,
        context_length=context_length,
        eos_token_ids=eos_token_ids,
    )
    tokenizer = ByteTokenizer() if pieces is None else PieceTokenizer(pieces)
    engine = Engine(runner, tokenizer, DRAFT, gamma=gamma, max_batch=max_batch, max_rows=max_rows)
    return engine, runner


def blocks_of(engine: Engine) -> BlockAllocator:
    """The allocator of an engine's cache."""
    return engine.scheduler.blocks


def drain(engine: Engine, max_steps: int = 20_000) -> list[Emission]:
    """Step until there is no work left, then check that every block came back."""
    emissions: list[Emission] = []
    for _ in range(max_steps):
        if not engine.has_work:
            blocks_of(engine).check_idle()
            return emissions
        emissions += engine.step()
    raise AssertionError(f"work is left after {max_steps} steps")


def greedy(max_tokens: int, **options: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **options)  # type: ignore[arg-type]


class RandomCheckpoint:
    """A model of random bf16 tensors that was never on disk."""

    kind = "hf"
    metadata: dict[str, object] = {}  # noqa: RUF012

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.path = Path("random")
        generator = torch.Generator().manual_seed(seed)
        self._tensors = {
            name: self._random(name, shape, generator)
            for name, shape in expected_shapes(config).items()
        }

    @staticmethod
    def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return (1 + 0.1 * values).to(torch.bfloat16)
        return (values / shape[1] ** 0.5).to(torch.bfloat16)

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def type_name(self, name: str) -> str:
        return "BF16"

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, target: Target) -> Tensor:
        return self._tensors[name]


TINY = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tied_head=False,
    context_length=512,
)


def tiny_decoder(
    target: Target,
    seed: int = 0,
    backend: str = "reference",
    group: int = 32,
    **changes: object,
) -> Decoder:
    """A random two-layer Llama, nested for a target."""
    config = replace(TINY, **changes)  # type: ignore[arg-type]
    checkpoint = RandomCheckpoint(config, seed)
    recipe = Recipe(target, group=group)
    return load_decoder(
        checkpoint, config, recipe, get_backend(backend), num_positions=config.context_length
    )


class RecordingRunner(Runner):
    """A runner that keeps the verify view's logits by request and position.

    A row that was rejected is computed again with the right tokens, so what is left at the end are
    the logits that decided each token.
    """

    def __init__(self, decoder: Decoder, num_blocks: int) -> None:
        device = decoder.ops.device
        super().__init__(decoder, allocate(decoder.config, num_blocks, decoder.dtype, device))
        self.logits: dict[tuple[int, int], Tensor] = {}

    def forward(self, batch: Batch, view: View) -> Tensor:
        logits = super().forward(batch, view)
        if view == VERIFY:
            rows = iter(logits)
            for span in batch.spans:
                for position in range(span.stop - span.num_logits, span.stop):
                    self.logits[span.request.request_id, position] = next(rows)
        return logits


@dataclass
class Run:
    """What came out of one batch, per request in the order they were added."""

    tokens: list[list[int]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # [output tokens, vocabulary] each
    requests: list[Request] = field(default_factory=list)

    @property
    def num_accepted(self) -> int:
        return sum(request.num_accepted for request in self.requests)

    @property
    def num_rejected(self) -> int:
        return sum(request.num_tested - request.num_accepted for request in self.requests)


def run_model(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    gamma: int | Sequence[int] = 0,
    view: View = DRAFT,
    num_blocks: int = 128,
    max_batch: int = 8,
    max_rows: int = 512,
) -> Run:
    """Complete prompts in one batch and keep the logits that decided each token."""
    runner = RecordingRunner(decoder, num_blocks)
    engine = Engine(runner, ByteTokenizer(), view, gamma=0, max_batch=max_batch, max_rows=max_rows)
    gammas = [gamma] * len(prompts) if isinstance(gamma, int) else gamma
    options = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    run = Run()
    for prompt, each_gamma, each in zip(prompts, gammas, options, strict=True):
        run.requests.append(engine.add(prompt, each, gamma=each_gamma))
    drain(engine)
    for request in run.requests:
        first, last = len(request.prompt) - 1, request.num_tokens - 1
        rows = [runner.logits[request.request_id, position] for position in range(first, last)]
        run.tokens.append(list(request.output))
        run.logits.append(torch.stack(rows))
    return run


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit."""
    width = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return left.dtype == right.dtype and torch.equal(left.view(width), right.view(width))


def assert_identical(got: Run, expected: Run) -> None:
    """Tokens and logits of every request are equal, bit for bit."""
    assert got.tokens == expected.tokens
    for index, (left, right) in enumerate(zip(got.logits, expected.logits, strict=True)):
        assert same_bits(left, right), f"logits of request {index} differ"


def ragged_prompts(num_prompts: int, vocab_size: int, *, seed: int = 1) -> list[list[int]]:
    """Prompts of length 1, short ones, and some longer than a block and a prompt tile."""
    lengths = [1, 5, 70, 16, 2, 33, 1, 17][:num_prompts]
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths
    ]
