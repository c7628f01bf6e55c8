"""The Hadamard rotation of a linear's input: what spreads a large channel over many.

With H orthogonal, x W^T = (x H) (W H)^T. A few channels of x are many times larger than the rest
and take the range of a group's 4-bit integers for themselves; in x H every channel is a sum of
many, and none stands out (QuIP, Chee et al. 2023, arXiv 2307.13304; QuaRot, Ashkboos et al. 2024,
arXiv 2404.00456, section 4). W H is computed once, x H in every step, with additions alone.

For K columns and a Hadamard matrix of n rows, n a power of two that divides K, the matrix is
H_n (x) I: columns that lie K/n apart are mixed with each other. No K is refused on the way: where
QuaRot needs a Hadamard matrix of the odd factor (9 for 576 = 64 x 9), here the K/n sets of columns
stay apart. That loses nothing, since each group of columns has a scale of its own.
"""

import math

from torch import Tensor

__all__ = ["order_for", "transform"]


def order_for(num_cols: int, largest: int) -> int:
    """Rows of the Hadamard matrix for K columns: the largest power of two up to `largest`, itself
    one, that divides K; 1 leaves the columns as they are."""
    return math.gcd(num_cols, largest)


def transform(x: Tensor, order: int) -> Tensor:
    """x [..., K] float32 times H (x) I, H of `order` rows: the same shape.

    Its own inverse. The order of additions is the same for every row: butterflies over columns K/n
    apart, then 2 K/n, and so on, and one multiplication by n^-1/2 at the end.
    """
    num_cols = x.shape[-1]
    distance = num_cols // order
    out = x
    while distance < num_cols:
        pairs = out.reshape(*x.shape[:-1], -1, 2, distance)
        first, second = pairs.unbind(-2)
        out = pairs.new_empty(pairs.shape)
        out[..., 0, :] = first + second
        out[..., 1, :] = first - second
        distance *= 2
    return out.reshape(x.shape) * (1 / math.sqrt(order))
