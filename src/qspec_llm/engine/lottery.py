"""Distributions as whole numbers of tickets, so that sums are exact in any order.

What `sampling` and `accept` do with probabilities, for many lines at once and without asking the
host anything, so that it can be captured in a graph. A GPU adds floats in an order that depends on
the shape; tickets are integers, so a line's token does not depend on the lines beside it. The most
likely token has 2^34 tickets; one that is 2^34 times less likely than it has none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Options", "draw", "judge", "tickets"]

MOST = 2.0**34  # tickets of the most likely token: a vocabulary's total stays exact in float64
RESIDUAL = 2.0**45  # tickets over which a residual distribution is spread


@dataclass(frozen=True)
class Options:
    """Sampling options of L lines, [L] each.

    Attributes:
        temperature: float64; 0 for the most likely token.
        top_p, min_p: float64.
        top_k: int64, 0 for all.
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor

    def repeat(self, count: int) -> "Options":
        """Each line `count` times, one after the other."""
        return Options(
            *(
                x.repeat_interleave(count)
                for x in (self.temperature, self.top_p, self.min_p, self.top_k)
            )
        )


def tickets(logits: Tensor, options: Options, *, has_filters: bool) -> Tensor:
    """Tickets [L, V] int64 of logits [L, V] float32.

    Args:
        logits: of one line each.
        options: of the lines.
        has_filters: whether any of them has a top_k or top_p; without, nothing is sorted.
    """
    is_greedy = (options.temperature == 0)[:, None]
    temperature = torch.where(is_greedy, 1.0, options.temperature[:, None]).float()
    top, best = logits.max(-1, keepdim=True)
    # the first of several most likely tokens
    first = torch.where(logits == top, torch.arange(logits.shape[1], device=logits.device), best)
    is_best = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, first.amin(-1, True), True)
    weights = (torch.exp((logits - top) / temperature).double() * MOST).long()
    weights = weights.masked_fill(weights < options.min_p[:, None] * MOST, 0)
    if has_filters:
        weights = _filtered(weights, options)
    return torch.where(is_greedy, is_best.long(), weights)


def _filtered(weights: Tensor, options: Options) -> Tensor:
    """Weights with those outside of top_k, then of top_p, set to 0."""
    size = weights.shape[1]
    ranked, order = weights.sort(dim=-1, descending=True, stable=True)
    top_k = torch.where(options.top_k > 0, options.top_k, size).clamp(max=size)
    smallest = ranked.gather(-1, top_k[:, None] - 1)
    ranked = ranked.masked_fill(ranked < smallest, 0)
    before = ranked.cumsum(-1) - ranked
    # a token stays if those before it have not reached top_p yet
    is_out = before >= options.top_p[:, None] * ranked.sum(-1, keepdim=True)
    is_out &= options.top_p[:, None] < 1
    return torch.zeros_like(weights).scatter_(-1, order, ranked.masked_fill(is_out, 0))


def draw(weights: Tensor, draws: Tensor) -> Tensor:
    """The tokens [L] that draws [L] float64 in [0, 1) win: weights [L, V] int64."""
    ends = weights.cumsum(-1)
    total = ends[:, -1:]
    winner = (draws[:, None] * total).long().minimum(total - 1)
    return torch.searchsorted(ends, winner, right=True).squeeze(-1)


def judge(
    draft_tokens: Tensor,
    draft_weights: Tensor,
    target_weights: Tensor,
    num_drafts: Tensor,
    accept_draws: Tensor,
    residual_draws: Tensor,
) -> tuple[Tensor, Tensor]:
    """Speculative sampling (`accept.accept_sampled`) of B lines with up to G drafts each.

    Args:
        draft_tokens: [B, G].
        draft_weights: [B, G, V], what they were drawn from.
        target_weights: [B, G + 1, V].
        num_drafts: [B], drafts that count.
        accept_draws: [B, G].
        residual_draws: [B, G + 1].

    Returns:
        How many drafts stand and the token after them, [B] each.
    """
    num_lines, width = target_weights.shape[:2]
    lines = torch.arange(num_lines, device=draft_tokens.device)
    target_totals = target_weights.sum(-1).double()  # [B, G + 1]
    num_accepted = torch.zeros_like(num_drafts)
    if width > 1:
        draft_totals = draft_weights.sum(-1).double()  # [B, G]
        proposed = draft_weights.gather(-1, draft_tokens[..., None])[..., 0].double()
        wanted = target_weights[:, :-1].gather(-1, draft_tokens[..., None])[..., 0].double()
        # draw * draft(x) < target(x), over a common denominator
        stands = accept_draws * proposed * target_totals[:, :-1] < wanted * draft_totals
        stands &= torch.arange(width - 1, device=lines.device) < num_drafts[:, None]
        num_accepted = stands.long().cumprod(-1).sum(-1)
    weights = target_weights[lines, num_accepted]  # [B, V]
    if width > 1:
        at = num_accepted.clamp(max=width - 2)
        target = weights.double() * (RESIDUAL / target_totals[lines, num_accepted])[:, None]
        draft = draft_weights[lines, at].double() * (RESIDUAL / draft_totals[lines, at])[:, None]
        residual = (target - draft).clamp(min=0).long()
        # equal up to rounding: a rejection then has probability 0 up to rounding too
        is_residual = (num_accepted < num_drafts) & (residual.sum(-1) > 0)
        weights = torch.where(is_residual[:, None], residual, weights)
    return num_accepted, draw(weights, residual_draws[lines, num_accepted])
