"""The nested format: one weight matrix stored so that it can be read at two precisions.

A matrix W [N, K] is split along K into groups of G. Every weight has a 4-bit code c; every (row,
group) has a scale s and, on the affine grid, perhaps an offset b. Residual planes refine the code.

Field by field (docs/format.md has the bytes):

    plane   shape       dtype          holds
    q4      [N, K/2]    uint8          4-bit codes c, two to a byte
    r4      [N, K/2]    uint8          the next 4 bits (8- and 16-bit tensors)
    r8      [N, K]      uint8          the last 8 bits (16-bit tensors)
    scale   [N, K/G]    bf16 or f16    s
    offset  [N, K/G]    bf16 or f16    b (affine grid; absent where b = -8 s)

What they mean:

    grid     bits  draft reads                 verify reads
    signed   8     v s                         (16 v + r4 - 8) s/16
    signed   16    v s                         bf16 bits(A) + r - C, A = bf16((c - 7.5) s)
    affine   4     c s + b                     c s + b
    affine   8     (c + 7.5/16) s + b          (16 c + r4) s/16 + b

with v = c - 8 for c >= 8 and c - 7 below, so that c >= 8 tells the sign of w even where v = 0;
r = 256 r4 + r8 in 1..4095, C = 3583, and r = 0 for an exact zero with the sign of c.

A tensor may ask its draft to read r4 as well (`draft_bits` 8): then the draft's weight is the 8-bit
one. Functions here are the living definition; kernels are tested against them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.pack import unpack_nibbles

__all__ = [
    "GROUPS",
    "RESIDUAL_CENTRE",
    "Dense",
    "Grid",
    "PlaneSpec",
    "Planes",
    "Stored",
    "concat_rows",
    "draft_weight",
    "levels",
    "verify_bits",
    "verify_weight",
]

GROUPS = (32, 64, 128)
RESIDUAL_CENTRE = 3583  # C: r - C spans 28 octaves below the anchor to 4 octaves above it
SIGN_BIT = -32768  # 0x8000 as int16


class Grid(StrEnum):
    """What a 4-bit code means."""

    SIGNED = "signed"
    AFFINE = "affine"


@dataclass(frozen=True)
class PlaneSpec:
    """Shape and meaning of one nested tensor; equal specs can share a matrix multiplication."""

    num_rows: int
    num_cols: int
    group: int
    bits: int
    grid: Grid
    has_offset: bool = False
    scale_dtype: torch.dtype = torch.bfloat16
    draft_bits: int = 4

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise QSpecError(f"group size {self.group} is not one of {GROUPS}")
        if self.num_cols % self.group:
            raise QSpecError(f"{self.num_cols} columns do not divide into groups of {self.group}")
        if self.bits not in ((8, 16) if self.grid is Grid.SIGNED else (4, 8)):
            raise QSpecError(f"the {self.grid} grid has no {self.bits}-bit form")
        if self.has_offset and self.grid is Grid.SIGNED:
            raise QSpecError("the signed grid stores no offset")
        if self.scale_dtype not in (torch.bfloat16, torch.float16):
            raise QSpecError(f"scale dtype {self.scale_dtype} is not bfloat16 or float16")
        if self.grid is Grid.SIGNED and self.scale_dtype is not torch.bfloat16:
            raise QSpecError("the signed grid keeps its scales in bfloat16")
        if self.draft_bits not in (4, 8) or self.draft_bits > self.bits:
            raise QSpecError(
                f"a {self.bits}-bit tensor cannot be drafted at {self.draft_bits} bits"
            )
        if self.draft_bits == 8 and self.bits == 16:
            raise QSpecError("drafting at 8 bits needs an 8-bit tensor, not a 16-bit one")

    @property
    def num_groups(self) -> int:
        """Groups per row."""
        return self.num_cols // self.group

    @property
    def draft_bits_read(self) -> float:
        """Bits per weight that the draft view reads, scales included."""
        return self.draft_bits + 16 * (1 + self.has_offset) / self.group

    @property
    def bits_stored(self) -> float:
        """Bits per weight that are stored, scales included."""
        return self.bits + 16 * (1 + self.has_offset) / self.group

    def shapes(self) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of every plane that this spec stores."""
        n, k = self.num_rows, self.num_cols
        fields: dict[str, tuple[tuple[int, int], torch.dtype]] = {
            "q4": ((n, k // 2), torch.uint8),
            "scale": ((n, self.num_groups), self.scale_dtype),
        }
        if self.bits >= 8:
            fields["r4"] = ((n, k // 2), torch.uint8)
        if self.bits == 16:
            fields["r8"] = ((n, k), torch.uint8)
        if self.has_offset:
            fields["offset"] = ((n, self.num_groups), self.scale_dtype)
        return fields


@dataclass(frozen=True)
class Planes:
    """One nested tensor. Fields as in the module's table; absent planes are None."""

    spec: PlaneSpec
    q4: Tensor
    scale: Tensor
    r4: Tensor | None = None
    r8: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = self.spec.shapes()
        for name, tensor in self.tensors().items():
            if name not in shapes:
                raise QSpecError(f"plane {name!r} does not belong to {self.spec}")
            if (tuple(tensor.shape), tensor.dtype) != shapes[name]:
                raise QSpecError(
                    f"plane {name!r} is {tensor.dtype} {tuple(tensor.shape)}, not {shapes[name]}"
                )
        if missing := shapes.keys() - self.tensors().keys():
            raise QSpecError(f"plane {min(missing)!r} is missing")

    @classmethod
    def from_tensors(cls, spec: PlaneSpec, tensors: Mapping[str, Tensor]) -> "Planes":
        """Assemble from named planes; a missing or superfluous one is an error."""
        if unknown := tensors.keys() - spec.shapes().keys():
            raise QSpecError(f"plane {min(unknown)!r} does not belong to {spec}")
        if missing := spec.shapes().keys() - tensors.keys():
            raise QSpecError(f"plane {min(missing)!r} is missing")
        return cls(spec=spec, **tensors)

    def tensors(self) -> dict[str, Tensor]:
        """The planes that are present, by name."""
        fields = {
            "q4": self.q4, "r4": self.r4, "r8": self.r8, "scale": self.scale, "offset": self.offset
        }  # fmt: skip
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    def rows(self, index: Tensor | slice) -> "Planes":
        """The planes of some rows of the matrix (an embedding look-up reads only these)."""
        picked = {name: tensor[index] for name, tensor in self.tensors().items()}
        return Planes(spec=replace(self.spec, num_rows=picked["q4"].shape[0]), **picked)

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def draft_nbytes(self) -> int:
        """Bytes that the draft view reads."""
        skipped = {"r8"} if self.spec.draft_bits == 8 else {"r4", "r8"}
        return sum(tensor.nbytes for name, tensor in self.tensors().items() if name not in skipped)


@dataclass(frozen=True)
class Dense:
    """A tensor stored as it is, with the reason why it is not nested."""

    weight: Tensor
    reason: str

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self.weight.nbytes

    @property
    def draft_nbytes(self) -> int:
        """Bytes that the draft view reads: a dense tensor has one precision."""
        return self.weight.nbytes


Stored = Planes | Dense


def levels(planes: Planes, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integer levels, their scale and their offset: the weight is level * scale + offset.

    Args:
        planes: an affine tensor, or a signed one of any width.
        bits: 4 reads q4 alone, 8 reads q4 and r4.

    Returns:
        levels [N, K/G, G] int8 or int16, scale [N, K/G] float32, offset [N, K/G] float32 or None.
    """
    spec, scale = planes.spec, planes.scale.float()
    codes = unpack_nibbles(planes.q4, spec.group)
    high = codes.view(torch.int8)
    if spec.grid is Grid.SIGNED:
        high = (codes - (codes >> 3)).view(torch.int8).sub_(7)  # v
    if bits == 4:
        if spec.grid is Grid.SIGNED:
            return high, scale, None
        # where one c stands for 16 codes, the draft takes their middle
        middle = scale * (7.5 / 16) if spec.bits == 8 else None
        if planes.offset is None:
            return high - 8, scale, middle
        offset = planes.offset.float()
        return high, scale, offset if middle is None else offset + middle
    assert planes.r4 is not None
    full = high.to(torch.int16).mul_(16).add_(unpack_nibbles(planes.r4, spec.group))
    if spec.grid is Grid.SIGNED:
        return full.sub_(8), scale / 16, None
    if planes.offset is None:
        return full.sub_(128), scale / 16, None
    return full, scale / 16, planes.offset.float()


def draft_weight(planes: Planes) -> Tensor:
    """The weights the draft view computes with, [N, K] float32."""
    return _weight(*levels(planes, planes.spec.draft_bits))


def verify_weight(planes: Planes) -> Tensor:
    """The weights the verify view computes with, [N, K] float32 (16-bit tensors: exact bf16)."""
    if planes.spec.bits == 16:
        return verify_bits(planes).view(torch.bfloat16).float()
    return _weight(*levels(planes, planes.spec.bits))


def _weight(level: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    weight = level.float().mul_(scale[..., None])
    if offset is not None:
        weight.add_(offset[..., None])
    return weight.view(level.shape[0], -1)


def verify_bits(planes: Planes) -> Tensor:
    """The bf16 patterns of a 16-bit tensor, [N, K] int16: the original weights, bit for bit."""
    spec = planes.spec
    assert planes.r4 is not None
    assert planes.r8 is not None
    # bf16 * bf16 in torch multiplies in float32 and rounds once: exactly A.
    codes = unpack_nibbles(planes.q4, spec.group)
    anchor = codes.to(torch.bfloat16).sub_(7.5).mul_(planes.scale[..., None])
    anchor_bits = anchor.view(torch.int16)
    residual = unpack_nibbles(planes.r4, spec.group).to(torch.int16).mul_(256)
    residual.add_(planes.r8.view_as(residual))
    # All ones where r > 0, all zeros where r = 0: three cheap int16 passes, where a comparison and
    # a masked fill cost more than the rest of the decoding.
    is_nonzero = residual.clamp(max=1).neg_()
    bits = residual.sub_(RESIDUAL_CENTRE).add_(anchor_bits).bitwise_and_(is_nonzero)
    bits.bitwise_or_(anchor_bits.bitwise_and_(SIGN_BIT))
    return bits.view(spec.num_rows, spec.num_cols)


def concat_rows(parts: list[Planes]) -> Planes:
    """Stack matrices of equal spec (but for the number of rows) into one [sum N, K] matrix."""
    spec = replace(parts[0].spec, num_rows=sum(part.spec.num_rows for part in parts))
    names = parts[0].tensors()
    return Planes(spec=spec, **{n: torch.cat([p.tensors()[n] for p in parts]) for n in names})
