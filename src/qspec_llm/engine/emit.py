"""What a step tells the caller: new tokens, where they came from, and the text they complete."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qspec_llm.engine.accept import Accepted
from qspec_llm.engine.batch import Batch
from qspec_llm.engine.request import FinishReason, Request

__all__ = ["Emission", "Segment", "emit"]


@dataclass(frozen=True)
class Segment:
    """A piece of text, and whether an accepted draft (or the verifier itself) made it."""

    text: str
    is_drafted: bool


@dataclass(frozen=True)
class Emission:
    """News of one request.

    Attributes:
        request_id: whose.
        token_ids: tokens added.
        num_drafted: how many of them came from the draft: the first ones of a step.
        segments: text that is certain now, by origin.
        finish_reason: set in its last emission.
    """

    request_id: int
    token_ids: tuple[int, ...]
    num_drafted: int
    segments: tuple[Segment, ...]
    finish_reason: FinishReason | None

    @property
    def text(self) -> str:
        """Text that is certain now."""
        return "".join(segment.text for segment in self.segments)

    def then(self, later: "Emission") -> "Emission":
        """This and the next of the same request, as one."""
        return Emission(
            self.request_id,
            self.token_ids + later.token_ids,
            self.num_drafted + later.num_drafted,
            self.segments + later.segments,
            later.finish_reason,
        )


def emit(batch: Batch, accepted: Sequence[Accepted], num_before: Sequence[int]) -> list[Emission]:
    """Emissions of the spans that decided tokens.

    Args:
        batch: the step's spans, committed.
        accepted: their outcomes.
        num_before: output tokens of each request before the step.
    """
    emissions = []
    for span, outcome, before in zip(batch.spans, accepted, num_before, strict=True):
        request = span.request
        if not outcome.tokens:
            continue
        if request.is_finished:
            request.text.finish()
        emissions.append(
            Emission(
                request.request_id,
                tuple(request.output[before:]),
                min(outcome.num_accepted, len(request.output) - before),
                tuple(_take_segments(request)),
                request.finish_reason,
            )
        )
    return emissions


def _take_segments(request: Request) -> Iterator[Segment]:
    """The text to hand out now, cut where its origin changes."""
    start = request.text.num_taken
    text = request.text.take(is_final=request.is_finished)
    first = bisect_right(request.text.ends, start)  # the token that the text to hand out begins in
    ends = request.text.ends[first:]
    for end, is_drafted in zip(ends, request.is_drafted[first:], strict=False):
        if piece := text[: end - start]:
            yield Segment(piece, is_drafted)
            text, start = text[len(piece) :], start + len(piece)
    if text:  # the rest of a character that never became whole
        yield Segment(text, request.is_drafted[-1])
