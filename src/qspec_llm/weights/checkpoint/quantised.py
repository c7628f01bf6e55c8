"""What GPTQ, AWQ and compressed-tensors checkpoints have in common: w = s (q - z), by group.

A format says how codes, scales and zero points of a module are packed; this module turns them into
our affine planes where the grid allows, else into floats (docs/format.md, "Imported checkpoints").
The codes always survive exactly. Zero points that are the middle of the range need no offset, so
symmetric checkpoints are kept bit for bit. Others become an offset b = -z s, rounded once to the
scales' dtype: off by at most 2^-12 of |b| for float16, a 256th of a 4-bit step.

What cannot be kept is dequantised, s (q - z) in float32: columns whose groups are not contiguous
(act-order), groups that are no multiple of 32, scales of a dtype that the format does not have.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint.base import Metadata
from qspec_llm.weights.checkpoint.safetensors_dir import SafetensorsCheckpoint
from qspec_llm.weights.pack import pack_nibbles
from qspec_llm.weights.planes import GROUPS, Grid, Planes, PlaneSpec, Stored
from qspec_llm.weights.quantize import Recipe, Target, draft_bits, nest

__all__ = ["Codes", "QuantisedCheckpoint", "to_planes", "unpack_words"]

LINEAR = "_proj.weight"  # how names of linears end, but for the LM head's
BLOCK_ELEMENTS = 1 << 20  # weights that are dequantised at a time


@dataclass(frozen=True)
class Codes:
    """One matrix as a quantised checkpoint has it: w[n, k] = s[n, g(k)] (q[n, k] - z[n, g(k)]).

    Attributes:
        values: [N, K] uint8, q.
        scale: [N, groups], s in the file's own dtype.
        zero: [N, groups] int16, z.
        bits: 4 or 8.
        column_groups: [K] int64, g(k).
    """

    values: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    column_groups: Tensor

    def weight(self) -> Tensor:
        """The weights [N, K] float32, exact: a product of at most 11 and 9 bits."""
        index = self.column_groups
        out = torch.empty(self.values.shape, dtype=torch.float32)
        num_rows = max(1, BLOCK_ELEMENTS // self.values.shape[1])  # temporaries stay small
        for start in range(0, len(out), num_rows):
            part = slice(start, start + num_rows)
            level = self.values[part].to(torch.int16) - self.zero[part][:, index]
            torch.mul(level.float(), self.scale[part].float()[:, index], out=out[part])
        return out


class QuantisedCheckpoint(SafetensorsCheckpoint, ABC):
    """A model directory whose linears are packed integers, under the names of their floats.

    `target` is what "auto" means: the checkpoint's own precision where all of its tensors can be
    kept, else `bf16`, which then reproduces the dequantised weights.
    """

    method: str  # as config.json calls it
    packed: str  # suffix of the tensor that every quantised module has
    parts: tuple[str, ...]  # suffixes of the others

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.check(self.metadata["quantization_config"])
        names, suffix = super().names(), f".{self.packed}"
        self._modules = {name.removesuffix(suffix) for name in names if name.endswith(suffix)}
        if not self._modules:
            raise QSpecError(
                f"{path} says that it is quantised with {self.method!r}, but no tensor is"
            )
        hidden = {f"{m}.{part}" for m in self._modules for part in (self.packed, *self.parts)}
        hidden |= {name for name in names if self._is_idle_bias(name)}
        self._names = sorted({*names} - hidden | {f"{m}.weight" for m in self._modules})
        bits = {module: self.bits(module) for module in sorted(self._modules)}
        for module, width in bits.items():
            if width not in (4, 8):
                raise QSpecError(
                    f"{module!r} of {path} has {width} bits; {self.method} is imported at 4 and 8"
                )
        own = Target.INT4 if 4 in bits.values() else Target.INT8
        self.target = own if all(map(self._is_ordered, self._modules)) else Target.BF16

    @abstractmethod
    def check(self, config: Metadata) -> None:
        """Refuse a quantization_config that asks for more than this class reads."""

    @abstractmethod
    def bits(self, module: str) -> int:
        """Bits of a module's codes, by the shapes of its tensors."""

    @abstractmethod
    def codes(self, module: str) -> Codes:
        """A module's codes, scales and zero points, unpacked."""

    @abstractmethod
    def matrix_shape(self, module: str) -> tuple[int, int]:
        """Rows and columns of a module's weight."""

    @abstractmethod
    def group_index(self, module: str) -> Tensor | None:
        """[K] the group of each column, where the file says; None where they are in order."""

    def names(self) -> list[str]:
        """The names of all tensors, quantised ones under that of their weight."""
        return self._names

    def type_name(self, name: str) -> str:
        """What the file stores: "Q4 gptq", or the dtype of a float."""
        if module := self._module_of(name):
            return f"Q{self.bits(module)} {self.method}"
        return super().type_name(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, as floats."""
        module = self._module_of(name)
        return self.matrix_shape(module) if module else super().shape(name)

    def read(self, name: str, target: Target) -> Tensor | Stored:
        """One tensor: planes where `target` keeps the file's codes, else floating point."""
        module = self._module_of(name)
        if module is None:
            value = super().read(name, target)
            if isinstance(value, Tensor) and target is self.target and name.endswith(LINEAR):
                # the quantiser left this one in floats, which are part of the model it made
                return nest(value, Recipe(Target.BF16, group=GROUPS[0]))
            return value
        codes = self.codes(module)
        if not torch.isfinite(codes.scale).all():
            raise QSpecError(f"tensor {name!r} of {self.path} has a scale of inf or NaN")
        kept = {Target.INT4: (4, 8), Target.INT8: (8,), Target.BF16: ()}
        if codes.bits in kept[target] and (planes := to_planes(codes, target)) is not None:
            return planes
        if target is Target.INT4:
            # as with GGUF's types that are not affine: 8 bits from the dequantised values
            return nest(codes.weight(), Recipe(target, group=GROUPS[0]), is_vocabulary=True)
        return codes.weight()

    def _module_of(self, name: str) -> str | None:
        module = name.removesuffix(".weight")
        return module if name.endswith(".weight") and module in self._modules else None

    def _is_ordered(self, module: str) -> bool:
        """Whether the columns of every group lie together, in order."""
        index = self.group_index(module)
        return index is None or bool((index[1:] >= index[:-1]).all())

    def _is_idle_bias(self, name: str) -> bool:
        """Whether a tensor is a bias that the family does not have and that is zero.

        Some quantisers give every linear one.
        """
        module, _, leaf = name.rpartition(".")
        if leaf != "bias" or module not in self._modules:
            return False
        has_bias = self.metadata.get("model_type") == "qwen2" and module.endswith(
            ("q_proj", "k_proj", "v_proj")
        )
        return not has_bias and not self.tensor(name).any()


def to_planes(codes: Codes, target: Target) -> Planes | None:
    """Affine planes of the same codes; None where the format cannot hold them."""
    num_rows, num_cols = codes.values.shape
    group = _group(codes)
    if group is None:
        return None
    first = codes.column_groups[::group]  # a source group may be several of ours
    scale, zero = codes.scale[:, first], codes.zero[:, first]
    if codes.bits == 8:
        scale = scale.float() * 16
    has_offset = bool((zero != 1 << (codes.bits - 1)).any())
    dtype = _scale_dtype(scale, has_offset=has_offset)
    if dtype is None:
        return None
    tensors = {"scale": scale.to(dtype)}
    if has_offset:
        step = scale.float() / 16 if codes.bits == 8 else scale.float()
        tensors["offset"] = (step * -zero.float()).to(dtype)
        if not torch.isfinite(tensors["offset"]).all():
            return None
    if codes.bits == 8:
        tensors["r4"] = pack_nibbles(codes.values & 15, group)
    high = codes.values >> 4 if codes.bits == 8 else codes.values
    tensors["q4"] = pack_nibbles(high, group)
    spec = PlaneSpec(
        num_rows,
        num_cols,
        group=group,
        bits=codes.bits,
        grid=Grid.AFFINE,
        has_offset=has_offset,
        scale_dtype=dtype,
        draft_bits=draft_bits(target) if codes.bits == 8 else 4,
    )
    return Planes.from_tensors(spec, tensors)


def _group(codes: Codes) -> int | None:
    """Our largest group whose columns always share a scale."""
    index = codes.column_groups
    for group in reversed(GROUPS):
        if len(index) % group == 0:
            grouped = index.view(-1, group)
            if (grouped == grouped[:, :1]).all():
                return group
    return None


def _scale_dtype(scale: Tensor, *, has_offset: bool) -> torch.dtype | None:
    """A dtype of the format that holds the scales exactly.

    float16 is preferred where there is an offset, whose rounding is finer there.
    """
    order = [torch.float16, torch.bfloat16]
    if scale.dtype is torch.bfloat16 and not has_offset:
        order.reverse()
    for dtype in order:
        if torch.equal(scale.to(dtype).float(), scale.float()):
            return dtype
    return None


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Codes [R, C * 32 / bits] uint8 of int32 words [R, C], the lowest bits first."""
    codes = words.contiguous().view(torch.uint8)  # [R, 4 C], the lowest byte first
    if bits == 8:
        return codes
    return torch.stack((codes & 15, codes >> 4), dim=-1).view(words.shape[0], -1)
