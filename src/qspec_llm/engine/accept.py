"""Which drafted tokens stand, and the token after them. The algorithm is two pure functions.

Greedy: a draft stands while it is the verify view's own choice. Sampling: speculative sampling
(Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2), whose output has exactly the
verify view's distribution, whatever the draft's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qspec_llm.engine.batch import Batch, Span
from qspec_llm.engine.draft import Drafts
from qspec_llm.engine.random import Stream, uniform
from qspec_llm.engine.request import TokenLogprobs
from qspec_llm.engine.sampling import adjust, argmax, pick, probabilities

__all__ = ["Accepted", "accept", "accept_greedy", "accept_sampled", "in_order"]


@dataclass(frozen=True)
class Accepted:
    """Outcome for one span: accepted drafts and one token of the verifier's own.

    No tokens for a span that ends before the last known one, which decides nothing yet.
    `prompt_logprobs` are those of the prompt tokens after its scored rows.
    """

    tokens: tuple[int, ...] = ()
    num_accepted: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


def accept_greedy(draft_tokens: Sequence[int], target_tokens: Sequence[int]) -> int:
    """How many drafts equal the verifier's choice before the first that does not.

    Args:
        draft_tokens: gamma tokens.
        target_tokens: gamma + 1, the verifier's choice at each position.
    """
    pairs = zip(draft_tokens, target_tokens, strict=False)
    return next(
        (i for i, (draft, target) in enumerate(pairs) if draft != target), len(draft_tokens)
    )


def accept_sampled(
    draft_tokens: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    accept_draws: Tensor,
    residual_draws: Tensor,
) -> tuple[int, int]:
    """Speculative sampling: how many drafts stand, and the token drawn after them.

    A draft x stands with probability min(1, target(x) / draft(x)). The token after the first that
    does not is drawn from max(target - draft, 0), normalised; after gamma accepted drafts it is
    drawn from the target.

    Args:
        draft_tokens: [gamma] int64.
        draft_probs: [gamma, V], the distributions the drafts were drawn from.
        target_probs: [gamma + 1, V].
        accept_draws: [gamma] in [0, 1).
        residual_draws: [gamma + 1] in [0, 1).
    """
    gamma = len(draft_tokens)
    index = torch.arange(gamma)
    target, proposed = target_probs[index, draft_tokens], draft_probs[index, draft_tokens]
    stands = accept_draws * proposed < target
    num_accepted = int(stands.long().cumprod(0).sum())
    probs = target_probs[num_accepted]
    if num_accepted < gamma:
        residual = (probs - draft_probs[num_accepted]).clamp(min=0)
        # Equal up to rounding: a rejection then has probability 0 up to rounding too.
        probs = residual if residual.sum() > 0 else probs
    draw = residual_draws[num_accepted]
    return num_accepted, int(pick(probs[None], draw[None]))


def accept(batch: Batch, drafts: Drafts, logits: Tensor) -> list[Accepted]:
    """Decide every span of a verified batch.

    Args:
        batch: the spans as scheduled, before drafts were appended.
        drafts: what was proposed after each.
        logits: [sum over deciding spans of drafted + 1, vocabulary] from the verify view.
    """
    parts = _split(batch, drafts, logits)
    return [
        _score(span, part, _decide(span, drafted, probs, _after(part, span.num_scored)))
        for span, drafted, probs, part in zip(
            batch.spans, drafts.tokens, drafts.probs, parts, strict=True
        )
    ]


def in_order(
    batch: Batch, advanced: Mapping[int, Accepted], rest: Sequence[Accepted]
) -> list[Accepted]:
    """Outcomes of a batch, some known by request id, those of the other spans in their order."""
    others = iter(rest)
    return [
        advanced[key] if (key := span.request.request_id) in advanced else next(others)
        for span in batch.spans
    ]


def _split(batch: Batch, drafts: Drafts, logits: Tensor) -> Iterator[Tensor]:
    first = 0
    for span, drafted in zip(batch.spans, drafts.tokens, strict=True):
        count = span.num_logits + len(drafted)
        yield logits[first : first + count]
        first += count


def _after(logits: Tensor, num_scored: int) -> Tensor:
    return logits[num_scored:] if num_scored else logits  # a slice costs 2 us a span


def _decide(span: Span, drafted: list[int], draft_probs: list[Tensor], logits: Tensor) -> Accepted:
    """One span: logits [gamma + 1, vocabulary], or none."""
    if not len(logits):
        return Accepted()
    request = span.request
    adjusted = adjust(logits, request, drafted)
    if request.params.is_greedy:
        target_tokens = argmax(adjusted)
        num_accepted = accept_greedy(drafted, target_tokens)
        last = target_tokens[num_accepted]
    else:
        positions = torch.arange(span.stop, span.stop + len(drafted) + 1)
        num_accepted, last = accept_sampled(
            torch.tensor(drafted, dtype=torch.int64),
            torch.stack(draft_probs) if draft_probs else adjusted[:0],
            probabilities(adjusted, request.params),
            uniform(request.seed, request.sample, positions[:-1], Stream.ACCEPT),
            uniform(request.seed, request.sample, positions, Stream.RESIDUAL),
        )
    tokens = (*drafted[:num_accepted], last)
    return Accepted(tokens, num_accepted, _logprobs(logits, tokens, request.params.logprobs))


def _score(span: Span, logits: Tensor, accepted: Accepted) -> Accepted:
    """Add how likely the prompt's tokens were to the outcome, where that is wanted."""
    if not span.num_scored:
        return accepted
    start = span.stop - (span.num_scored + bool(accepted.tokens)) + 1
    tokens = tuple(span.request.prompt[start : start + span.num_scored])
    num_top = span.request.params.prompt_logprobs
    return replace(accepted, prompt_logprobs=_logprobs(logits, tokens, num_top))


def _logprobs(
    logits: Tensor, tokens: tuple[int, ...], num_top: int | None
) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities of the chosen tokens and the most likely ones, from raw verify logits."""
    if num_top is None:
        return ()
    table = torch.log_softmax(logits[: len(tokens)].double(), dim=-1)
    top = table.topk(min(num_top, table.shape[-1]), dim=-1)
    return tuple(
        TokenLogprobs(
            token, float(table[row, token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
        )
        for row, (token, ids, values) in enumerate(
            zip(tokens, top.indices, top.values, strict=True)
        )
    )
