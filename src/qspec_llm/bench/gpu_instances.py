"""Which instances of the linears' kernels are fastest; so those in split.py and wide.py are chosen.

Every instance that fits computes one linear of a layer at a time, in turn with the others, as in
`gpu_linears`, after its result was compared, bit for bit. For who has changed a kernel, or tunes
another GPU that split.cu and wide.cu run on (Hopper).
"""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields, replace
from itertools import product
from typing import Any

import torch

from qspec_llm.bench import gpu_linears
from qspec_llm.bench.gpu_linears import HEAD_DIM, Case
from qspec_llm.errors import QSpecError
from qspec_llm.kernels.cuda import split, wide
from qspec_llm.kernels.cuda.compile import Kernel, architecture, compile_source
from qspec_llm.kernels.cuda.form import RANGES, Form, form_of_weight
from qspec_llm.kernels.cuda.layout import TILE_COLS, TILE_ROWS, PackedPlanes, pack
from qspec_llm.kernels.cuda.linear import Tuning, linear
from qspec_llm.model.load import draft_group
from qspec_llm.weights.quantize import Recipe, nest
from qspec_llm.weights.view import View

__all__ = ["CASES", "bench", "instances", "show"]

CASES = ("verify bf16", "verify int4", "draft a8")
MOST_THREADS = 1024  # of a block
FEWEST_STAGES = 3  # of x in shared memory, with which wide.cu still fetches one ahead
SHOWN = 4  # instances of a linear
LEAST_BYTES = 256 << 20  # of the matrices that take turns: more than any L2 holds
CHOSEN = "chosen"

Instance = tuple[Tuning, Kernel]


def instances(
    form: Form, num_tokens: int, num_rows: int, num_cols: int, device: int
) -> Iterator[Instance]:
    """Those that compute x [num_tokens, num_cols] times weights [num_rows, num_cols]."""
    token_tiles = math.ceil(num_tokens / 8)
    row_tiles, col_tiles = math.ceil(num_rows / TILE_ROWS), math.ceil(num_cols / TILE_COLS)
    if split.LEAST_TOKENS <= num_tokens <= split.MAX_TOKENS:
        for rows, depth, teams, parts in product((1, 2), (1, 2), range(1, 9), (1, 2, 4)):
            one = split.Tuning(rows, depth, teams, parts, lead=depth)
            laid = split.cut(form, one, token_tiles, col_tiles)
            if laid and 32 * teams * RANGES // parts <= MOST_THREADS:
                yield one, split.instance(form, token_tiles, one, laid)
    if num_tokens >= wide.LEAST_TOKENS:
        seen = set()
        units = (None, 1, 2, 4, 8)
        for groups, each in product((2, 3, 4), units):
            other = wide.Tuning(groups, each)
            found = wide.instance(form, row_tiles, col_tiles, num_tokens, device, other)
            launch = (found.kernel.defines, found.grid)
            if found.num_stages >= FEWEST_STAGES and launch not in seen:
                seen.add(launch)
                yield other, found.kernel


def bench(
    shape: str,
    rows: Sequence[int],
    case: str,
    *,
    group: int = 128,
    rounds: int = 9,
) -> dict[str, Any]:
    """Time every instance of one case.

    Args:
        shape: a model of `bench.shapes`.
        rows: numbers of rows of x.
        case: of `CASES`.
        group: weights that share one scale.
        rounds: replays of each graph that count.

    Returns:
        Microseconds by linear, rows and instance, that of the engine as "chosen"; ready for JSON.

    Raises:
        QSpecError: no such case, another kind of GPU, or an instance computes something else.
    """
    if case not in CASES:
        raise QSpecError(f"instances of {case!r} are not measured; give one of {', '.join(CASES)}")
    device = torch.cuda.current_device()
    if not wide.can_run(wide.LEAST_TOKENS, device):
        raise QSpecError(
            f"{torch.cuda.get_device_name()} runs neither split.cu nor wide.cu, whose instances "
            "are measured; both need Hopper (sm_90)"
        )
    one = gpu_linears.CASES[case]
    results: list[dict[str, Any]] = []
    for name, (num_rows, num_cols) in gpu_linears.shapes_of(shape).items():
        weight, view = _some_weight(one, group, num_rows, num_cols)
        form = form_of_weight(weight, view)
        for count in rows:
            found = list(instances(form, count, num_rows, num_cols, device))
            _compile([kernel for _, kernel in found], device)
            _compare(weight, view, count, [tuning for tuning, _ in found])
            cases = {"cublas": gpu_linears.CASES["cublas"], CHOSEN: one}
            cases |= {_label(tuning): replace(one, tuning=tuning) for tuning, _ in found}
            report = gpu_linears.bench(
                {name: (num_rows, num_cols)},
                [count],
                cases=cases,
                group=group,
                layers=math.ceil(LEAST_BYTES / gpu_linears.bytes_read(weight, view)),
                rounds=rounds,
            )
            results += [
                {"linear": name, "rows": count, "instance": row["case"], "us": row["us"]}
                for row in report["results"]
                if row["case"] in cases
            ]
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "shape": shape,
        "case": case,
        "group": group,
        "rounds": rounds,
        "results": results,
    }


def _some_weight(case: Case, group: int, num_rows: int, num_cols: int) -> tuple[PackedPlanes, View]:
    """A matrix such as `gpu_linears` makes, and the view that reads it."""
    assert case.target is not None
    plain = torch.randn(num_rows, num_cols, device="cuda")
    packed = pack(nest(plain, Recipe(case.target, group, clip_steps=1)))
    assert isinstance(packed, PackedPlanes), "random weights can be nested"
    return packed, replace(case.view, group=draft_group([packed.spec], HEAD_DIM))


def _compile(kernels: Sequence[Kernel], device: int) -> None:
    """Fill the cache of cubins, on all cores: launches would compile one after the other."""
    arch = architecture(device)
    missing = {(one.source, one.defines) for one in kernels}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda one: compile_source(one[0], arch, one[1]), missing))


def _compare(weight: PackedPlanes, view: View, count: int, found: Sequence[Tuning]) -> None:
    """Check that every instance computes the same bits.

    Raises:
        QSpecError: one does not.
    """
    x = torch.randn(count, weight.shape[1], device="cuda").bfloat16()
    rows = gpu_linears.rows_of(is_prompt=False)
    wanted = linear(x, weight, None, view, rows)
    for one in found:
        out = torch.full_like(wanted, torch.nan)
        if not torch.equal(linear(x, weight, None, view, rows, out=out, chosen=one), wanted):
            raise QSpecError(f"{_label(one)} computes other sums than the instance that is chosen")


def _label(tuning: Tuning) -> str:
    """What differs from the usual: "wide groups=2 units=8"."""
    kernel = "wide" if isinstance(tuning, wide.Tuning) else "split"
    values = [
        f"{one.name}={getattr(tuning, one.name)}"
        for one in fields(tuning)
        if one.default is MISSING or getattr(tuning, one.name) != one.default
    ]
    return " ".join([kernel, *values])


def show(report: dict[str, Any]) -> str:
    """The fastest instances of every linear and number of rows beside the one that is chosen."""
    lines = [
        f"{report['device']}, {report['shape']}, {report['case']}, groups of {report['group']}: "
        "microseconds of one linear"
    ]
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in report["results"]:
        found.setdefault((row["linear"], row["rows"]), {})[row["instance"]] = row["us"]
    for (name, count), times in found.items():
        cublas, chosen = times.pop("cublas"), times.pop(CHOSEN)
        lines.append(f"{name}, {count} rows: cublas {cublas:.1f}, {CHOSEN} {chosen:.1f}")
        best = sorted(times.items(), key=lambda one: one[1])[:SHOWN]
        lines += [f"{us:10.1f}  {label}" for label, us in best]
    return "\n".join(lines)
