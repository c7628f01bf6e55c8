"""The KV cache's tensors: only this module and attention kernels know how K and V are stored."""

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.kernels import LayerKV
from qspec_llm.kv.blocks import BLOCK_SIZE
from qspec_llm.model.config import ModelConfig

__all__ = ["allocate", "kv_bytes_per_token"]

HOST = torch.device("cpu")


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token's K and V take over all layers."""
    return 2 * config.num_layers * config.kv_size * dtype.itemsize


def allocate(
    config: ModelConfig,
    num_blocks: int,
    dtype: torch.dtype,
    device: torch.device = HOST,
) -> tuple[LayerKV, ...]:
    """K and V of every layer, [num_blocks * BLOCK_SIZE, KV heads, D] each, on a device.

    Zeros, since attention multiplies masked slots by 0 and whatever lay there must be finite. Pages
    of the system's memory are taken only when they are first written.

    Raises:
        QSpecError: the device has no room for it.
    """
    shape = (num_blocks * BLOCK_SIZE, config.num_kv_heads, config.head_dim)

    def zeros() -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    try:
        return tuple(LayerKV(zeros(), zeros(), BLOCK_SIZE) for _ in range(config.num_layers))
    except torch.OutOfMemoryError:
        num_tokens = num_blocks * BLOCK_SIZE
        nbytes = num_tokens * kv_bytes_per_token(config, dtype)
        raise QSpecError(
            f"a KV cache of {num_tokens} tokens takes {nbytes >> 20} MiB, more than {device} has "
            "free; choose a smaller max_tokens_in_kv"
        ) from None
