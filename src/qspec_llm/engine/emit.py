"""What a step tells the caller: new tokens, where they came from, and the text they complete."""

from collections.abc import Sequence
from dataclasses import dataclass

from qspec_llm.engine.accept import Accepted
from qspec_llm.engine.batch import Batch
from qspec_llm.engine.request import FinishReason

__all__ = ["Emission", "emit"]


@dataclass(frozen=True)
class Emission:
    """News of one request.

    Attributes:
        request_id: whose.
        token_ids: tokens added in this step.
        num_drafted: how many of them, the first ones, came from the draft.
        text: text that is certain now.
        finish_reason: set in its last emission.
    """

    request_id: int
    token_ids: tuple[int, ...]
    num_drafted: int
    text: str
    finish_reason: FinishReason | None


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
                request.text.take(is_final=request.is_finished),
                request.finish_reason,
            )
        )
    return emissions
