"""Counter-based random numbers: a draw is a function of its key, never of what was drawn before.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), on tensors,
so that it runs wherever the logits are.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Stream", "philox", "uniform"]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
FEW = 32  # draws up to which numbers are quicker than 150 small tensor operations

Word = TypeVar("Word", int, Tensor)


class Stream(IntEnum):
    """What a draw decides; one position has one independent draw for each."""

    PROPOSAL = 0
    ACCEPT = 1
    RESIDUAL = 2  # the token after a rejection, the bonus token, and every plain draw


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Ten rounds of Philox4x32: counter [..., 4] int64 holding 32-bit words, to the same shape."""
    return torch.stack(_rounds(counter.unbind(-1), key), -1)


def _rounds(words: Sequence[Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """The ten rounds on four words, each a number or a tensor of them.

    int64 products wrap modulo 2^64, so both 32-bit halves of a product are right there too.
    """
    c0, c1, c2, c3 = words
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & MASK, (p1 >> 32) & MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & MASK, high0 ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def uniform(seed: int, sample: int, positions: Tensor, stream: Stream) -> Tensor:
    """Uniform numbers in [0, 1) for some positions of one request.

    Args:
        seed: 64-bit seed of the request.
        sample: which of its completions.
        positions: [L] int64, positions of the tokens being decided.
        stream: what is decided.

    Returns:
        [L] float64, multiples of 2^-32.
    """
    seed %= 1 << 64
    key = (seed & MASK, seed >> 32)
    if positions.device.type == "cpu" and positions.numel() <= FEW:
        draws = [_rounds((p, int(stream), sample, 0), key)[0] for p in positions.tolist()]
        return torch.tensor(draws, dtype=torch.float64) * 2.0**-32
    constant = torch.full_like(positions, int(stream))
    counter = torch.stack(
        (positions, constant, torch.full_like(positions, sample), torch.zeros_like(positions)), -1
    )
    return philox(counter, key)[..., 0].double() * 2.0**-32
