"""The packed arrangement: the bits of a stored tensor in the order in which kernels read them.

Sixteen rows of a matrix form a panel and lie side by side, one to a lane (the last panel is filled
up with zero weights). With P panels, field by field:

    plane    packed shape        holds
    q4, r4   [P, K/8, 16, 4]     byte j of a row: column j of eight in the low nibble, 4 + j in the
                                 high one
    r8       [P, K/4, 16, 4]     byte j of a row: column j of four
    scale    [P, K/G, 16]        one scale (or offset) a row
    dense    [P, K, 16]          one value a row

Four bytes of a lane meet four columns of the activations in one integer dot product. Of 16-bit
tensors r4 and r8 are complemented, which makes `bits(16 anchor) - complement` the whole decoding
(linear.inl, exact_weight). The arrangement is the same on every instruction set.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.kernels.cpu import _cpu
from qspec_llm.kernels.cpu.arena import Arena
from qspec_llm.weights.pack import pack_nibbles, unpack_nibbles
from qspec_llm.weights.planes import Dense, Grid, Planes, PlaneSpec, Stored

__all__ = ["TYPE_CODES", "PackedDense", "PackedMatrix", "PackedPlanes", "pack", "unpack"]

TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GRID_CODES = {Grid.SIGNED: 0, Grid.AFFINE: 1}
DENSE_GRID = 2
PANEL = _cpu.PANEL
ARENA = Arena()
# Decoding goes through 2^23 times the anchor, which must stay finite.
LARGEST_EXACT_SCALE = 2.0**100


@dataclass(frozen=True)
class PackedPlanes:
    """A nested tensor; `planes` are the tensors of the module's table, by name."""

    spec: PlaneSpec
    planes: dict[str, Tensor]
    matrix: _cpu.Matrix

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.spec.num_rows, self.spec.num_cols

    def tensors(self) -> list[Tensor]:
        """The tensors that hold its bytes."""
        return list(self.planes.values())


@dataclass(frozen=True)
class PackedDense:
    """A dense tensor [P, K, 16] of a matrix of `shape`."""

    shape: tuple[int, int]
    weight: Tensor
    reason: str
    matrix: _cpu.Matrix

    def tensors(self) -> list[Tensor]:
        """The tensor that holds its bytes."""
        return [self.weight]


PackedMatrix = PackedPlanes | PackedDense


def pack(stored: Stored) -> PackedMatrix:
    """Arrange a matrix for the kernels.

    Raises:
        QSpecError: a dense tensor is not a matrix of floats, or a scale is beyond 2^100.
    """
    return _pack_dense(stored) if isinstance(stored, Dense) else _pack_planes(stored)


def unpack(packed: PackedMatrix) -> Stored:
    """Undo `pack` exactly."""
    num_rows = packed.shape[0]
    if isinstance(packed, PackedDense):
        weight = packed.weight.permute(0, 2, 1).reshape(-1, packed.shape[1])
        return Dense(weight[:num_rows].contiguous(), packed.reason)
    spec, planes = packed.spec, dict(packed.planes)
    return Planes.from_tensors(
        spec, {name: _to_rows(name, plane, spec)[:num_rows] for name, plane in planes.items()}
    )


def _pack_planes(stored: Planes) -> PackedPlanes:
    spec = stored.spec
    if spec.bits == 16 and float(stored.scale.max()) > LARGEST_EXACT_SCALE:
        raise QSpecError(
            f"a scale of {float(stored.scale.max()):.3g} is beyond the 2^100 that the CPU kernels "
            "decode exactly; the reference backend computes such a tensor"
        )
    planes = {name: _to_panels(name, plane, spec) for name, plane in stored.tensors().items()}
    matrix = _cpu.Matrix(
        num_rows=spec.num_rows,
        num_cols=spec.num_cols,
        grid=GRID_CODES[spec.grid],
        bits=spec.bits,
        draft_bits=spec.draft_bits,
        group=spec.group,
        type_code=TYPE_CODES[spec.scale_dtype],
        **{name: plane.data_ptr() for name, plane in planes.items()},
    )
    return PackedPlanes(spec, planes, matrix)


def _pack_dense(stored: Dense) -> PackedDense:
    weight = stored.weight
    if weight.ndim != 2 or weight.dtype not in TYPE_CODES:
        raise QSpecError(
            f"a dense weight is {weight.dtype} {tuple(weight.shape)}; the CPU backend reads "
            "matrices of float32, bfloat16 or float16"
        )
    panels = _settle(_pad(weight).view(-1, PANEL, weight.shape[1]).permute(0, 2, 1))
    matrix = _cpu.Matrix(
        num_rows=weight.shape[0],
        num_cols=weight.shape[1],
        grid=DENSE_GRID,
        bits=0,
        draft_bits=0,
        group=0,
        type_code=TYPE_CODES[weight.dtype],
        dense=panels.data_ptr(),
    )
    return PackedDense((weight.shape[0], weight.shape[1]), panels, stored.reason, matrix)


def _settle(arranged: Tensor) -> Tensor:
    """The tensor, contiguous, where the kernels read it fastest."""
    return ARENA.empty(arranged.shape, arranged.dtype).copy_(arranged)


def _pad(rows: Tensor) -> Tensor:
    """Rows of zeros up to whole panels."""
    missing = -rows.shape[0] % PANEL
    return torch.cat((rows, rows.new_zeros(missing, rows.shape[1]))) if missing else rows


def _to_panels(name: str, plane: Tensor, spec: PlaneSpec) -> Tensor:
    if name in ("scale", "offset"):
        return _settle(_pad(plane).view(-1, PANEL, spec.num_groups).permute(0, 2, 1))
    if spec.bits == 16 and name != "q4":
        plane = ~plane
    if name == "r8":
        # padding is all ones once complemented, but any residual of a zero scale is harmless
        return _settle(_pad(plane).view(-1, PANEL, spec.num_cols // 4, 4).permute(0, 2, 1, 3))
    codes = unpack_nibbles(_pad(plane), spec.group).view(-1, PANEL, spec.num_cols // 8, 2, 4)
    return _settle((codes[..., 0, :] | codes[..., 1, :] << 4).permute(0, 2, 1, 3))


def _to_rows(name: str, plane: Tensor, spec: PlaneSpec) -> Tensor:
    if name in ("scale", "offset"):
        return plane.permute(0, 2, 1).reshape(-1, spec.num_groups)
    rows = plane.permute(0, 2, 1, 3)
    if name == "r8":
        return ~rows.reshape(-1, spec.num_cols)
    codes = torch.stack((rows & 15, rows >> 4), dim=-2).reshape(-1, spec.num_cols)
    packed = pack_nibbles(codes, spec.group)
    return ~packed if spec.bits == 16 and name != "q4" else packed
