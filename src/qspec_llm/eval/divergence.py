"""How far one reading of a model is from another: sums over positions, a step at a time."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qspec_llm.eval.forced import Step

__all__ = ["Divergence", "measure"]


@dataclass
class Divergence:
    """One reading's figures over all positions seen so far.

    Attributes:
        num_tokens: positions.
        nll: summed negative log-likelihood of the tokens that follow, in nats.
        kl: KL(reference || reading) at each position, in nats.
        flips: positions where its most likely token is not the reference's.
        overlap: summed share of probability it has in common with the verify view: the chance that
            its draft stands when tokens are sampled at temperature 1.
        hits: by k, positions where the verify view's choice is among its k most likely tokens;
            for k = 1 that is greedy agreement.
    """

    num_tokens: int = 0
    nll: float = 0.0
    kl: list[float] = field(default_factory=list)
    flips: int = 0
    overlap: float = 0.0
    hits: dict[int, int] = field(default_factory=lambda: {1: 0, 2: 0, 4: 0})

    def add(self, logprobs: Tensor, reference: Tensor, verify: Tensor, next_tokens: Tensor) -> None:
        """Add S positions: log-probabilities [S, vocabulary] float32, next tokens [S] int64."""
        self.num_tokens += len(next_tokens)
        self.nll -= float(logprobs.gather(1, next_tokens[:, None]).double().sum())
        divergence = reference.exp().mul_(reference - logprobs).nan_to_num_(nan=0.0)
        self.kl += divergence.sum(-1, dtype=torch.float64).tolist()
        self.flips += int((logprobs.argmax(-1) != reference.argmax(-1)).sum())
        self.overlap += float(torch.minimum(logprobs, verify).exp_().sum())
        choice = verify.argmax(-1, keepdim=True)
        ranked = logprobs.topk(min(max(self.hits), logprobs.shape[-1]), dim=-1).indices == choice
        for k in self.hits:
            self.hits[k] += int(ranked[:, :k].any(-1).sum())

    def summary(self) -> dict[str, Any]:
        """Means, and the 99th percentile of the divergence (nearest rank)."""
        n = max(self.num_tokens, 1)
        ranked = sorted(self.kl) or [0.0]
        return {
            "tokens": self.num_tokens,
            "perplexity": math.exp(self.nll / n),
            "kl_mean": sum(self.kl) / n,
            "kl_p99": ranked[min(len(ranked) * 99 // 100, len(ranked) - 1)],
            "flips": self.flips / n,
            "agreement": self.hits[1] / n,
            "agreement_top2": self.hits[2] / n,
            "agreement_top4": self.hits[4] / n,
            "overlap": self.overlap / n,
        }


def measure(
    figures: dict[str, Divergence], step: Step, *, reference: str, verify: str = "verify"
) -> None:
    """Add a step to the figures of every reading in it.

    Args:
        figures: by reading; new ones are begun.
        step: logits by reading.
        reference: the reading that divergence and flips are counted from.
        verify: the reading that drafts are checked against.
    """
    logprobs = {name: torch.log_softmax(logits, dim=-1) for name, logits in step.logits.items()}
    for name, own in logprobs.items():
        figures.setdefault(name, Divergence()).add(
            own, logprobs[reference], logprobs[verify], step.next_tokens
        )
