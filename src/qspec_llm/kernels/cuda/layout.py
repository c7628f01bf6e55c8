"""The packed arrangement: the bits of a stored tensor in the order in which CUDA kernels read them.

A matrix is cut into tiles of 16 rows x 128 columns, its edges filled up with zero weights. With RT
row tiles and CT column tiles, field by field:

    field   packed shape      holds, a tile
    base    [RT, CT, bytes]   q4 (1024 bytes), scales [128/G, 16], offsets [128/G, 16] (16 bits)
    rest    [RT, CT, bytes]   r4 (1024 bytes), r8 (2048 bytes), those that exist
    dense   [RT, CT, 4096]    bf16 values

Within a plane of nibbles [half, lane, word, byte]: lane 4 g + t holds rows g and g + 8, word j the
columns 64 half + 16 j + {2t, 2t + 8, 2t + 1, 2t + 9}, row g in the low nibbles and row g + 8 in the
high ones. r8 is [half, word pair, lane, word, row, byte] with bytes in the order of the columns.
Dense is [half, step, lane, register, half of it], the A fragments of mma.m16n8k16. tile.cuh reads
this; the reasons are there.

A tile is contiguous, and the tiles of 16 rows follow each other along the columns: what a warp
reads is one stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.pack import pack_nibbles, unpack_nibbles
from qspec_llm.weights.planes import Dense, Planes, PlaneSpec, Stored

__all__ = [
    "TILE_COLS",
    "TILE_ROWS",
    "PackedDense",
    "PackedMatrix",
    "PackedPlain",
    "PackedPlanes",
    "pack",
    "unpack",
]

TILE_ROWS, TILE_COLS = 16, 128
NIBBLE_BYTES, BYTE_BYTES, DENSE_BYTES = 1024, 2048, 4096
# Decoding subtracts 28 octaves from an anchor, two weights to a register (tile.cuh, refine).
SMALLEST_EXACT_SCALE = 2.0**-97
BLOCK_WEIGHTS = 1 << 26  # weights arranged at a time: temporaries stay small next to the tensor


@dataclass(frozen=True)
class PackedPlanes:
    """A nested tensor; fields as in the module's table, uint8. `rest` is None at 4 bits."""

    spec: PlaneSpec
    base: Tensor
    rest: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.spec.num_rows, self.spec.num_cols

    def tensors(self) -> list[Tensor]:
        """The tensors that hold its bytes."""
        return [self.base] if self.rest is None else [self.base, self.rest]


@dataclass(frozen=True)
class PackedDense:
    """A dense bf16 matrix of `shape` in tiles."""

    shape: tuple[int, int]
    base: Tensor
    reason: str

    def tensors(self) -> list[Tensor]:
        """The tensor that holds its bytes."""
        return [self.base]


@dataclass(frozen=True)
class PackedPlain:
    """A dense matrix of another float type, as it is: torch multiplies it."""

    weight: Tensor
    reason: str

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.weight.shape[0], self.weight.shape[1]

    def tensors(self) -> list[Tensor]:
        """The tensor that holds its bytes."""
        return [self.weight]


PackedMatrix = PackedPlanes | PackedDense | PackedPlain


def pack(stored: Stored, device: torch.device | str = "cuda") -> PackedMatrix:
    """Arrange a matrix for the kernels, on `device`; returns once it is there.

    Kernels read weights before earlier kernels have ended (compile.Kernel.launch, pdl), so nothing
    may still be writing them.

    Raises:
        QSpecError: a dense tensor is not a matrix of floats, or a scale is below 2^-97.
    """
    packed = _pack_dense(stored, device) if isinstance(stored, Dense) else _pack(stored, device)
    if packed.tensors()[0].is_cuda:
        torch.cuda.synchronize()
    return packed


def unpack(packed: PackedMatrix) -> Stored:
    """Undo `pack` exactly; the tensors stay on their device."""
    if isinstance(packed, PackedPlain):
        return Dense(packed.weight, packed.reason)
    if isinstance(packed, PackedDense):
        bits = _dense_to_rows(packed.base)[: packed.shape[0], : packed.shape[1]]
        return Dense(bits.contiguous().view(torch.bfloat16), packed.reason)
    spec, n, k = packed.spec, packed.spec.num_rows, packed.spec.num_cols
    tensors = {"q4": pack_nibbles(_nibbles_to_rows(packed.base)[:n, :k].contiguous(), spec.group)}
    for index, name in enumerate(("scale", "offset")[: 1 + spec.has_offset]):
        values = _scales_to_rows(packed.base, spec, index)[:n, : spec.num_groups]
        tensors[name] = values.contiguous().view(spec.scale_dtype)
    if packed.rest is not None:
        codes = _nibbles_to_rows(packed.rest)[:n, :k].contiguous()
        tensors["r4"] = pack_nibbles(codes, spec.group)
    if packed.rest is not None and spec.bits == 16:
        tensors["r8"] = _bytes_to_rows(packed.rest)[:n, :k].contiguous()
    return Planes.from_tensors(spec, tensors)


def tile_bytes(spec: PlaneSpec) -> tuple[int, int]:
    """Bytes of a tile's base and rest."""
    scales = TILE_COLS // spec.group * TILE_ROWS * 2 * (1 + spec.has_offset)
    rest = {4: 0, 8: NIBBLE_BYTES, 16: NIBBLE_BYTES + BYTE_BYTES}[spec.bits]
    return NIBBLE_BYTES + scales, rest


def _pack(stored: Planes, device: torch.device | str) -> PackedPlanes:
    spec = stored.spec
    row_tiles, col_tiles = -(-spec.num_rows // TILE_ROWS), -(-spec.num_cols // TILE_COLS)
    base_bytes, rest_bytes = tile_bytes(spec)
    empty = torch.empty
    base = empty(row_tiles, col_tiles, base_bytes, dtype=torch.uint8, device=device)
    rest = empty(row_tiles, col_tiles, rest_bytes, dtype=torch.uint8, device=device)
    for tiles, rows in _blocks(spec.num_rows, spec.num_cols):
        part = {name: plane[rows].to(device) for name, plane in stored.tensors().items()}
        base[tiles, :, :NIBBLE_BYTES] = _to_nibbles(_codes(part["q4"], spec))
        for index, name in enumerate(("scale", "offset")[: 1 + spec.has_offset]):
            size = TILE_COLS // spec.group * TILE_ROWS * 2
            start = NIBBLE_BYTES + index * size
            base[tiles, :, start : start + size] = _to_scales(part[name], spec)
        if spec.bits == 16:
            _check_scales(part, spec)
        if "r4" in part:
            rest[tiles, :, :NIBBLE_BYTES] = _to_nibbles(_codes(part["r4"], spec))
        if "r8" in part:
            rest[tiles, :, NIBBLE_BYTES:] = _to_bytes(_pad(part["r8"]))
    return PackedPlanes(spec, base, rest if rest_bytes else None)


def _check_scales(part: dict[str, Tensor], spec: PlaneSpec) -> None:
    """Refuse weights beside exact zeros that are too small to be decoded in pairs."""
    is_small = part["scale"].float() < SMALLEST_EXACT_SCALE
    if not is_small.any():
        return
    grouped = part["r8"].view(*part["scale"].shape, spec.group)
    nibbles = unpack_nibbles(part["r4"], spec.group)
    is_used = ((grouped > 0) | (nibbles > 0)).any(-1)  # groups of nothing but zeros are fine
    if (is_small & is_used).any():
        raise QSpecError(
            f"a scale of {float(part['scale'][is_small & is_used].min()):.3g} is below the 2^-97 "
            "that the cuda kernels decode exactly; the reference backend computes such a tensor"
        )


def _pack_dense(stored: Dense, device: torch.device | str) -> PackedDense | PackedPlain:
    weight = stored.weight
    if weight.ndim != 2 or not weight.is_floating_point():
        raise QSpecError(
            f"a dense weight is {weight.dtype} {tuple(weight.shape)}; the cuda backend reads "
            "matrices of floats"
        )
    if weight.dtype is not torch.bfloat16:
        return PackedPlain(weight.to(device), stored.reason)
    n, k = weight.shape
    row_tiles, col_tiles = -(-n // TILE_ROWS), -(-k // TILE_COLS)
    base = torch.empty(row_tiles, col_tiles, DENSE_BYTES, dtype=torch.uint8, device=device)
    for tiles, rows in _blocks(n, k):
        base[tiles] = _to_dense(_pad(weight[rows].to(device).view(torch.int16)))
    return PackedDense((n, k), base, stored.reason)


def _blocks(num_rows: int, num_cols: int) -> Iterator[tuple[slice, slice]]:
    """Row tiles and their rows, a block at a time."""
    step = max(1, BLOCK_WEIGHTS // (TILE_ROWS * num_cols))
    for first in range(0, -(-num_rows // TILE_ROWS), step):
        rows = slice(first * TILE_ROWS, min(num_rows, (first + step) * TILE_ROWS))
        yield slice(first, first + step), rows


def _codes(plane: Tensor, spec: PlaneSpec) -> Tensor:
    return _pad(unpack_nibbles(plane, spec.group).flatten(1))


def _pad(rows: Tensor, width: int = TILE_COLS) -> Tensor:
    """[N, K] filled up with zeros to whole tiles."""
    down, right = -rows.shape[0] % TILE_ROWS, -rows.shape[1] % width
    return torch.nn.functional.pad(rows, (0, right, 0, down)) if down or right else rows


# Axes of a matrix cut into tiles: row = 16 T + 8 u + g, column = 128 C + 64 h + 16 j + 8 b1 + 2 t
# + b0. Below, each packed order is a permutation of (T, u, g, C, h, j, b1, t, b0).
_AXES = (2, 8, 2, 4, 2, 4, 2)


def _split(rows: Tensor) -> Tensor:
    u, g, h, j, b1, t, b0 = _AXES
    return rows.view(rows.shape[0] // TILE_ROWS, u, g, -1, h, j, b1, t, b0)


def _join(split: Tensor, order: tuple[int, ...]) -> Tensor:
    """Undo `_split(rows).permute(order)`."""
    rows = split.permute([order.index(axis) for axis in range(len(order))])
    return rows.reshape(rows.shape[0] * TILE_ROWS, -1)


_NIBBLE_ORDER = (0, 3, 4, 2, 7, 5, 8, 6, 1)  # T C h g t j b0 b1, then u: the nibble
_BYTE_ORDER = (0, 3, 4, 5, 2, 8, 6, 1, 7, 9)  # T C h pair g t word u b1 b0, with j cut in two
_DENSE_ORDER = (0, 3, 4, 5, 2, 7, 6, 1, 8)  # T C h j g t, register (b1, u), b0


def _to_nibbles(codes: Tensor) -> Tensor:
    pairs = _split(codes).permute(_NIBBLE_ORDER)
    return (pairs[..., 0] | pairs[..., 1] << 4).reshape(*pairs.shape[:2], NIBBLE_BYTES)


def _nibbles_to_rows(tiles: Tensor) -> Tensor:
    plane = tiles[:, :, :NIBBLE_BYTES]
    pairs = torch.stack((plane & 15, plane >> 4), -1)
    return _join(pairs.view(*tiles.shape[:2], 2, 8, 4, 4, 2, 2, 2), _NIBBLE_ORDER)


def _to_bytes(values: Tensor) -> Tensor:
    split = _split(values)
    split = split.view(*split.shape[:5], 2, 2, *split.shape[6:])
    ordered = split.permute(_BYTE_ORDER)
    return ordered.reshape(*ordered.shape[:2], BYTE_BYTES)


def _bytes_to_rows(tiles: Tensor) -> Tensor:
    plane = tiles[:, :, NIBBLE_BYTES:]
    return _join(plane.reshape(*tiles.shape[:2], 2, 2, 8, 4, 2, 2, 2, 2), _BYTE_ORDER)


def _to_dense(values: Tensor) -> Tensor:
    ordered = _split(values).permute(_DENSE_ORDER).contiguous()
    return ordered.view(*ordered.shape[:2], -1).view(torch.uint8)


def _dense_to_rows(tiles: Tensor) -> Tensor:
    values = tiles.view(torch.int16)
    return _join(values.view(*tiles.shape[:2], 2, 4, 8, 4, 2, 2, 2), _DENSE_ORDER)


def _to_scales(values: Tensor, spec: PlaneSpec) -> Tensor:
    groups = TILE_COLS // spec.group
    padded = _pad(values.view(torch.int16), groups)
    ordered = padded.view(padded.shape[0] // TILE_ROWS, TILE_ROWS, -1, groups).permute(0, 2, 3, 1)
    return ordered.reshape(*ordered.shape[:2], -1).contiguous().view(torch.uint8)


def _scales_to_rows(tiles: Tensor, spec: PlaneSpec, index: int) -> Tensor:
    groups = TILE_COLS // spec.group
    size = groups * TILE_ROWS * 2
    start = NIBBLE_BYTES + index * size
    values = tiles[:, :, start : start + size].contiguous().view(torch.int16)
    ordered = values.view(*tiles.shape[:2], groups, TILE_ROWS).permute(0, 3, 1, 2)
    return ordered.reshape(tiles.shape[0] * TILE_ROWS, -1)
