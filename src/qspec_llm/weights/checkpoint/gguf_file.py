"""A GGUF file: llama.cpp's format, read through the `gguf` package.

Q4_0, Q4_1 and Q8_0 blocks are our affine planes in another order, so targets that keep a
checkpoint's own precision take them exactly as shipped. Other quantised types are dequantised and
nested from their values. Rows of q and k, which GGUF permutes for the llama architecture, come back
in Hugging Face's order.
"""

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint.base import Metadata
from qspec_llm.weights.planes import Grid, Planes, PlaneSpec, Stored
from qspec_llm.weights.quantize import Recipe, Target, draft_bits, nest

__all__ = ["GGUFCheckpoint"]

FLOAT_TYPES = ("F32", "F16", "BF16")
QUANTISED_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
KEPT_AS_SHIPPED = {
    Target.INT4: ("Q4_0", "Q4_1", "Q8_0"),
    Target.INT8: ("Q8_0",),
    Target.BF16: (),
}
BLOCK = 32  # weights in a Q4_0, Q4_1 or Q8_0 block
UNREADABLE = (ValueError, IndexError, KeyError, OverflowError, OSError, MemoryError)

TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "rope_freqs": "rope_freqs",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; unknown names stay as they are."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, module, leaf = match.groups()
        return f"model.layers.{layer}.{BLOCK_NAMES.get(module, module)}.{leaf}"
    module, _, leaf = name.rpartition(".")
    return f"{TOP_NAMES.get(module, module)}.{leaf}"


class GGUFCheckpoint:
    """Reads one tensor at a time from a memory-mapped file."""

    kind: Literal["hf", "gguf", "nested"] = "gguf"

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        try:
            reader = GGUFReader(path)
            # The tokenizer's long arrays are transformers' to read.
            self.metadata: Metadata = {
                key: field.contents()
                for key, field in reader.fields.items()
                if not key.startswith("tokenizer.ggml.") or key.endswith("_id")
            }
        except UNREADABLE as error:
            raise QSpecError(f"{path} is truncated or not a readable GGUF file: {error}") from None
        self._tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
        end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
        if end > path.stat().st_size:
            raise QSpecError(
                f"{path} is truncated: its tensors end at byte {end}, "
                f"the file at {path.stat().st_size}"
            )

    def names(self) -> list[str]:
        """The names of all tensors."""
        return sorted(self._tensors)

    def type_name(self, name: str) -> str:
        """The GGUF type of a tensor."""
        return str(self._tensor(name).tensor_type.name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, outermost dimension first (GGUF lists the innermost first)."""
        return tuple(int(size) for size in reversed(self._tensor(name).shape))

    def read(self, name: str, target: Target) -> Tensor | Stored:
        """One tensor: planes where `target` keeps the file's codes, else floating point."""
        type_name, data = self.type_name(name), self._tensor(name).data
        if type_name not in FLOAT_TYPES + QUANTISED_TYPES:
            raise QSpecError(
                f"tensor {name!r} of {self.path} is {type_name}; "
                f"readable types are {', '.join(FLOAT_TYPES + QUANTISED_TYPES)}"
            )
        order = self._row_order(name, data.shape[0])
        if type_name in KEPT_AS_SHIPPED[target]:
            planes = _import_blocks(type_name, data, draft_bits=draft_bits(target))
            if planes is not None:
                return planes if order is None else planes.rows(order)
        weight = _dequantise(type_name, data)
        weight = weight if order is None else weight[order]
        if target is Target.INT4 and type_name in QUANTISED_TYPES:
            # 5- and 6-bit types, and K-quants with their two-level scales, keep their precision.
            return nest(weight, Recipe(target, group=BLOCK), is_vocabulary=True)
        return weight

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise QSpecError(f"{self.path} has no tensor {name!r}")
        return self._tensors[name]

    def _row_order(self, name: str, num_rows: int) -> Tensor | None:
        """Rows of a permuted q or k projection in Hugging Face's order, else None."""
        is_query = ".q_proj." in name
        if self.metadata.get("general.architecture") != "llama" or not (
            is_query or ".k_proj." in name
        ):
            return None
        num_heads = self.metadata["llama.attention.head_count"]
        if not is_query:
            num_heads = self.metadata.get("llama.attention.head_count_kv", num_heads)
        # GGUF interleaves the two halves that rotate together.
        pairs = torch.arange(num_rows).view(num_heads, num_rows // num_heads // 2, 2)
        return pairs.transpose(1, 2).flatten()


def _dequantise(type_name: str, data: np.ndarray[Any, Any]) -> Tensor:
    """Values of a tensor: F32, F16 and BF16 in their own dtype, quantised types in float32."""
    if type_name == "BF16":
        return torch.from_numpy(data.view(np.uint16).astype(np.int16)).view(torch.bfloat16)
    if type_name in FLOAT_TYPES:
        return torch.from_numpy(np.array(data))
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    # a scale of inf or NaN is `nest`'s to refuse
    with np.errstate(invalid="ignore", over="ignore"):
        return torch.from_numpy(dequantize(data, GGMLQuantizationType[type_name]))


def _import_blocks(type_name: str, data: np.ndarray[Any, Any], draft_bits: int) -> Planes | None:
    """Planes of a Q4_0, Q4_1 or Q8_0 tensor, its codes and scales exactly as shipped.

    Block layouts (GGML): Q4_0 = d f16, 16 bytes of nibbles, w = (c - 8) d; Q4_1 = d f16, m f16,
    16 bytes, w = c d + m; Q8_0 = d f16, 32 int8, w = q d. None where a scale does not survive.
    """
    num_rows = data.shape[0]
    payload = {"Q4_0": 16, "Q4_1": 16, "Q8_0": 32}[type_name]
    header = 4 if type_name == "Q4_1" else 2
    blocks = torch.from_numpy(np.array(data)).view(num_rows, -1, header + payload)
    scales = blocks[..., :header].contiguous().view(torch.float16)  # [N, K/32, 1 or 2]
    codes = blocks[..., header:]
    if not torch.isfinite(scales).all():
        return None
    tensors = {"scale": scales[..., 0].contiguous()}
    if type_name == "Q8_0":
        tensors["scale"] = tensors["scale"] * 16
        if not torch.isfinite(tensors["scale"]).all():
            return None
        codes = codes ^ 128  # q + 128
        halves = codes.view(num_rows, -1, 2, BLOCK // 2)
        low, high = halves[:, :, 0], halves[:, :, 1]
        tensors["r4"] = ((low & 15) | ((high & 15) << 4)).reshape(num_rows, -1)
        codes = (low >> 4) | (high & 0xF0)
    tensors["q4"] = codes.reshape(num_rows, -1)
    if type_name == "Q4_1":
        tensors["offset"] = scales[..., 1].contiguous()
    spec = PlaneSpec(
        num_rows,
        codes.shape[1] * BLOCK,
        group=BLOCK,
        bits=8 if type_name == "Q8_0" else 4,
        grid=Grid.AFFINE,
        has_offset=type_name == "Q4_1",
        scale_dtype=torch.float16,
        draft_bits=draft_bits if type_name == "Q8_0" else 4,
    )
    return Planes.from_tensors(spec, tensors)
