"""A request: its tokens, and one number that says how much of its KV is final.

Invariant (the watermark): KV at positions < `committed` was written by the verify view and is
final. Draft steps write past it; verify overwrites the same slots; commit moves it. Everything else
is derived: there is no prefill or decode phase and no rollback.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from qspec_llm.engine.grammar import Grammar
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.text import TextStream
from qspec_llm.kv.blocks import BLOCK_SIZE, extend_keys

__all__ = ["FinishReason", "Request", "TokenLogprobs"]

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities under the verify view at one position: the chosen token's, and the top."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Request:
    """One sequence being generated.

    Attributes:
        request_id: unique in its engine.
        prompt: prompt token ids, at least one.
        params: what the caller asked for.
        seed: 64-bit key of this request's random streams.
        sample: which of the `n` completions this is, the second key of its streams.
        gamma: tokens to draft in each cycle.
        is_auto: the engine chooses `gamma` anew before each cycle.
        max_total: tokens at which it ends, prompt included (max_tokens, context and cache size).
        stop_ids: tokens that end it.
        text: decodes its output and watches for stop strings.
        salt: requests with different salts share no cached blocks.
        grammar: what its output must follow.
    """

    request_id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    sample: int
    gamma: int
    max_total: int
    stop_ids: frozenset[int]
    text: TextStream
    is_auto: bool = False
    salt: bytes = b""
    grammar: Grammar | None = None

    output: list[int] = field(default_factory=list)
    is_drafted: list[bool] = field(default_factory=list)  # of each output token: an accepted draft
    committed: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its full blocks, see `block_keys`
    num_cached: int = 0  # positions whose KV was found when it was first admitted
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from the second token on
    # what speculation did: cycles that drafted or not, tokens drafted, of those tested, accepted
    num_cycles: int = 0
    num_drafted: int = 0
    num_tested: int = 0
    num_accepted: int = 0
    cycles_by_accepted: dict[int, int] = field(default_factory=dict)  # of the cycles that drafted

    @property
    def num_tokens(self) -> int:
        """Tokens known, prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def num_uncomputed(self) -> int:
        """Known tokens whose KV is not final: the gap that the next step closes."""
        return self.num_tokens - self.committed

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will be generated."""
        return self.finish_reason is not None

    @property
    def is_scoring(self) -> bool:
        """Whether log-probabilities of prompt tokens are still being computed."""
        return self.params.prompt_logprobs is not None and not self.output

    def tokens(self, start: int, stop: int) -> Sequence[int]:
        """Known tokens at positions start .. stop - 1."""
        num_prompt = len(self.prompt)
        if stop <= num_prompt:
            return self.prompt[start:stop]
        if start >= num_prompt:
            return self.output[start - num_prompt : stop - num_prompt]
        return [*self.prompt[start:], *self.output[: stop - num_prompt]]

    def block_keys(self) -> Sequence[bytes]:
        """Keys of the blocks that the known tokens fill (`kv.blocks.extend_keys`)."""
        start = len(self.keys) * BLOCK_SIZE
        if self.num_tokens - start >= BLOCK_SIZE:
            tokens = self.tokens(start, self.num_tokens)
            extend_keys(self.keys, tokens, len(self.prompt), self.salt)
        return self.keys

    def append(self, token: int, *, is_drafted: bool = False) -> None:
        """Add one generated token and finish the request if it is the last."""
        self.output.append(token)
        self.is_drafted.append(is_drafted)
        can_stop = len(self.output) >= self.params.min_tokens
        is_end = token in self.stop_ids and can_stop
        if is_end or self.text.push(token, can_stop=can_stop):
            self.finish_reason = "stop"
        elif self.num_tokens >= self.max_total:
            self.finish_reason = "length"
