"""What one step computes: a span of positions for each of some requests."""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from qspec_llm.engine.request import Request

__all__ = ["Batch", "Span"]


@dataclass(frozen=True)
class Span:
    """Tokens of one request at consecutive positions from `start`.

    `num_logits` is how many of its last rows' logits are wanted; the first `num_scored` of them
    only say how likely the next prompt token was. `gamma` is how many tokens may be drafted after
    it.
    """

    request: Request
    start: int
    tokens: tuple[int, ...]
    num_logits: int
    gamma: int = 0
    num_scored: int = 0

    @property
    def stop(self) -> int:
        """One past the last position."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """Spans of different requests, in the scheduler's order."""

    spans: tuple[Span, ...]

    def extend(self, drafts: Sequence[Sequence[int]]) -> "Batch":
        """The batch to verify: every span followed by its drafted tokens, with all their logits."""
        if not any(drafts):
            return self
        return Batch(
            tuple(
                replace(
                    span, tokens=(*span.tokens, *drafted), num_logits=span.num_logits + len(drafted)
                )
                for span, drafted in zip(self.spans, drafts, strict=True)
            )
        )

    def without(self, request_ids: Container[int]) -> "Batch":
        """The batch less some requests' spans."""
        return Batch(tuple(s for s in self.spans if s.request.request_id not in request_ids))

    @property
    def num_rows(self) -> int:
        """Rows to compute."""
        return sum(len(span.tokens) for span in self.spans)
