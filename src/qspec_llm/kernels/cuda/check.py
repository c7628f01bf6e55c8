"""A numeric self-check: every kernel that a model will use, once, against float64, before serving.

A driver, a compiler or a chip that computes something else is refused with a sentence instead of
answering wrongly. The matrices have few rows, and as many columns as the model's, since kernels are
chosen by them too; what costs time is compiling, which the first forward pass would do anyway.
Tests in tests/kernels/test_cuda.py go further.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.kernels import Rows, reference
from qspec_llm.kernels.cuda import split, wide
from qspec_llm.kernels.cuda.device import is_interpreted
from qspec_llm.kernels.cuda.form import Form, form_of_weight
from qspec_llm.kernels.cuda.layout import (
    TILE_ROWS,
    PackedDense,
    PackedMatrix,
    PackedPlain,
    PackedPlanes,
    pack,
)
from qspec_llm.kernels.cuda.linear import Tuning, linear
from qspec_llm.kernels.cuda.tables import embed
from qspec_llm.weights.planes import Dense, Planes, PlaneSpec, Stored, draft_weight, verify_weight
from qspec_llm.weights.view import VERIFY, View

__all__ = ["check", "check_packed", "some_planes"]

ROWS = (112, 128)  # that leave half a block over, and for blocks in pairs
COUNTS = (1, 5, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 160)  # one of every width of instance
PROMPT_COUNT = 72
LARGEST_ERROR = 1e-4  # norm-relative, of float32 sums
LARGEST_ROUNDED = 4e-3  # the same, with weights rounded to bf16


def check_packed(packed: Sequence[PackedMatrix], views: Sequence[View]) -> None:
    """`check` for the matrices of a model; Triton's interpreter has no such kernels."""
    if is_interpreted():
        return
    tiled = [one for one in packed if isinstance(one, PackedPlanes | PackedDense)]
    specs = {one.spec if isinstance(one, PackedPlanes) else one.shape for one in tiled}
    check(specs, views)


def check(specs: Iterable[PlaneSpec | tuple[int, int]], views: Iterable[View]) -> None:
    """Run every kernel that these tensors need in these views, and compare.

    Args:
        specs: of the model's tensors; [N, K] stands for a dense bf16 one. Their rows decide
            which instances are run, on few rows each.
        views: what the engine will read besides `VERIFY`.

    Raises:
        QSpecError: a kernel computed something else.
    """
    sizes: dict[PlaneSpec | tuple[int, int], set[int]] = defaultdict(set)
    for spec in specs:
        for rows in ROWS:
            if isinstance(spec, PlaneSpec):
                sizes[replace(spec, num_rows=rows)].add(spec.num_rows)
            else:
                sizes[rows, spec[1]].add(spec[0])
    device = torch.cuda.current_device()
    for size, num_rows in sizes.items():
        for view in {VERIFY, *views}:
            _check_form(size, frozenset(num_rows), view, device)


@functools.cache
def _check_form(
    spec: PlaneSpec | tuple[int, int], num_rows: frozenset[int], view: View, device: int
) -> None:
    stored: Stored
    if isinstance(spec, PlaneSpec):
        stored, name = some_planes(spec), f"a {spec.bits}-bit {spec.grid} tensor"
    else:
        stored, name = _some_dense(spec), "a dense tensor"
    packed = pack(stored, torch.device("cuda", device))
    assert not isinstance(packed, PackedPlain)
    rows, cols = packed.shape
    weight = _weight(stored, view)
    form = form_of_weight(packed, view)
    for is_prompt in (False, True):
        for count in (PROMPT_COUNT,) if is_prompt else COUNTS:
            generator = torch.Generator().manual_seed(count)
            x = torch.randn(count, cols, generator=generator).bfloat16()
            same = x.float()
            if view.is_draft and isinstance(packed, PackedPlanes):
                same = reference.round_activations(same, view)
            expected = same.double() @ weight.t()
            what = f"{name} of {cols} columns, {view.activation}, {count} rows"
            limit = LARGEST_ROUNDED if is_prompt else LARGEST_ERROR
            chosen: Iterable[Tuning | None] = (None,)
            if not is_prompt:
                chosen = _instances(form, packed.base.shape[1], num_rows, count, device)
            for one in chosen:
                out = torch.full((count, rows), torch.nan, device=packed.tensors()[0].device)
                here = x.to(out.device)
                linear(
                    here, packed, None, view, _rows(is_prompt), torch.float32, out=out, chosen=one
                )
                _compare(out, expected, limit, what)
    if not view.is_draft:
        tokens = torch.arange(rows, device=packed.tensors()[0].device)
        _compare(embed(tokens, packed, torch.float32), weight, 1e-6, f"the look-up in {name}")


def _instances(
    form: Form, col_tiles: int, num_rows: frozenset[int], count: int, device: int
) -> Iterable[Tuning | None]:
    """Those that may be chosen for matrices of so many rows."""
    if split.can_run(form, count, device):
        return split.instances(form, math.ceil(count / 8))
    if not wide.can_run(count, device):
        return (None,)
    row_tiles = {math.ceil(rows / TILE_ROWS) for rows in num_rows}
    token_tiles = wide.tiles_of(form, count)
    return {wide.tuning(form, token_tiles, each, col_tiles, device) for each in row_tiles}


def _compare(out: Tensor, expected: Tensor, limit: float, what: str) -> None:
    error = float((out.cpu().double() - expected).norm() / expected.norm())
    if not error <= limit:  # NaN is no number that passes
        raise QSpecError(
            f"the cuda backend's self-check failed on {torch.cuda.get_device_name()} for {what}: a "
            f"relative error of {error:.2g} where {limit:.0e} is allowed; use backend 'cpu' and "
            "report the versions of the driver and of qspec-llm"
        )


def _weight(stored: Stored, view: View) -> Tensor:
    if isinstance(stored, Dense):
        return stored.weight.double()
    return (draft_weight(stored) if view.is_draft else verify_weight(stored)).double()


def _some_dense(shape: tuple[int, int]) -> Dense:
    generator = torch.Generator().manual_seed(0)
    return Dense(torch.randn(shape, generator=generator).bfloat16(), "a self-check")


def some_planes(spec: PlaneSpec) -> Planes:
    """Planes of a spec with equally likely codes; 16-bit weights are finite, a tenth are zeros."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (shape, dtype) in spec.shapes().items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, shape, dtype=dtype, generator=generator)
        else:
            tensors[name] = (torch.rand(shape, generator=generator) * 0.02 + 0.005).to(dtype)
    if spec.bits == 16:
        # r4 = 12 or 13: residuals within an octave of the anchor. Zeros come in pairs of columns
        # that share a byte of r4.
        low, high = tensors["r4"] & 0x01, tensors["r4"] & 0x10
        is_zero = torch.rand(spec.num_rows, spec.num_cols // 2, generator=generator) < 0.1
        tensors["r4"] = (low | high | 0xCC).masked_fill(is_zero, 0)
        halves = is_zero.view(spec.num_rows, spec.num_groups, 1, spec.group // 2)
        both = halves.expand(-1, -1, 2, -1).reshape(spec.num_rows, spec.num_cols)
        tensors["r8"] = tensors["r8"].masked_fill(both, 0)
    if "offset" in tensors:
        tensors["offset"] = tensors["offset"] * -8
    return Planes.from_tensors(spec, tensors)


def _rows(is_prompt: bool) -> Rows:
    some = torch.zeros(1, dtype=torch.int64)
    return Rows(some, some, some, some, some, is_prompt=is_prompt)
