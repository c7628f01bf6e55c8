"""The KV cache's tensors: only this module and attention kernels know how K and V are stored."""

import torch

from qspec_llm.kernels import LayerKV
from qspec_llm.kv.blocks import BLOCK_SIZE
from qspec_llm.model.config import ModelConfig

__all__ = ["allocate", "kv_bytes_per_token"]


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token's K and V take over all layers."""
    return 2 * config.num_layers * config.kv_size * dtype.itemsize


def allocate(config: ModelConfig, num_blocks: int, dtype: torch.dtype) -> tuple[LayerKV, ...]:
    """K and V of every layer, [num_blocks * BLOCK_SIZE, KV heads, D] each.

    Zeros, since attention multiplies masked slots by 0 and whatever lay there must be finite. Pages
    of the system's memory are taken only when they are first written.
    """
    shape = (num_blocks * BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    return tuple(
        LayerKV(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), BLOCK_SIZE)
        for _ in range(config.num_layers)
    )
