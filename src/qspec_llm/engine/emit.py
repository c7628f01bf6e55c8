"""What steps tell the caller: new tokens, where they came from, and the text they complete."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

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
        num_drafted: how many of them came from the draft.
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


def emit(request: Request, start: int) -> Emission:
    """News of a request since it had `start` output tokens, of one step or of some in a row."""
    return Emission(
        request.request_id,
        tuple(request.output[start:]),
        sum(request.is_drafted[start:]),
        tuple(_take_segments(request)),
        request.finish_reason,
    )


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
