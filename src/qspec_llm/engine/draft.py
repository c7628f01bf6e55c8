"""Proposing tokens: gamma forward passes in the draft view, each one token further.

The draft writes its K and V past the watermark; nothing is undone, since verify overwrites them.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qspec_llm.engine.batch import Batch, Span
from qspec_llm.engine.random import Stream, uniform
from qspec_llm.engine.runner import Runner
from qspec_llm.engine.sampling import adjust, argmax, pick, probabilities
from qspec_llm.weights.view import View

__all__ = ["Drafts", "draft"]


@dataclass
class Drafts:
    """What was proposed, one entry a span: tokens, and their distributions where they were drawn.

    `probs` holds one [vocabulary] row a drafted token for requests that sample, none for greedy.
    """

    tokens: list[list[int]] = field(default_factory=list)
    probs: list[list[Tensor]] = field(default_factory=list)


def draft(runner: Runner, batch: Batch, view: View) -> Drafts:
    """Propose up to `span.gamma` tokens after each span of the batch."""
    drafts = Drafts([[] for _ in batch.spans], [[] for _ in batch.spans])
    for step in range(max((span.gamma for span in batch.spans), default=0)):
        live = [index for index, span in enumerate(batch.spans) if span.gamma > step]
        spans = tuple(_next_span(batch.spans[i], drafts.tokens[i]) for i in live)
        logits = runner.forward(Batch(spans), view)
        for index, row in zip(live, torch.split(logits, 1), strict=True):
            _propose(batch.spans[index], row, drafts.tokens[index], drafts.probs[index])
    return drafts


def _next_span(span: Span, drafted: list[int]) -> Span:
    """What to compute next: the span itself, then the token drafted last."""
    if not drafted:
        return replace(span, num_logits=1)
    return replace(span, start=span.stop + len(drafted) - 1, tokens=(drafted[-1],), num_logits=1)


def _propose(span: Span, logits: Tensor, tokens: list[int], probs: list[Tensor]) -> None:
    """Choose the next draft token from logits [1, vocabulary] and note it."""
    request = span.request
    logits = adjust(logits, request, tokens)
    if request.params.is_greedy:
        tokens += argmax(logits)
        return
    distribution = probabilities(logits, request.params)
    position = torch.tensor([span.stop + len(tokens)])
    draw = uniform(request.seed, request.sample, position, Stream.PROPOSAL)
    tokens.append(int(pick(distribution, draw)))
    probs.append(distribution[0])
