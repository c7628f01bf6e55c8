"""The linears of one model layer on a GPU: time, against cuBLAS in bf16 and against the memory.

Every case is one captured graph that computes a few layers, each with weights of its own, so that
nothing is found in the L2. Graphs are replayed in turn, A B C A B C, and the median counts; cuBLAS
is there twice, and how far the two differ is what noise can do. Memory speed is measured in the
same rounds, by reading.

Knows nothing of attention or of a whole step: that is `steps`.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qspec_llm.bench.shapes import SHAPES
from qspec_llm.engine.captured import captured
from qspec_llm.kernels import Rows
from qspec_llm.kernels.cuda.activations import quantize
from qspec_llm.kernels.cuda.layout import PackedMatrix, PackedPlanes, pack
from qspec_llm.kernels.cuda.linear import Tuning, linear, wants_integers
from qspec_llm.kernels.cuda.tables import read_memory
from qspec_llm.model.load import draft_group
from qspec_llm.weights.quantize import Recipe, Target, nest
from qspec_llm.weights.view import VERIFY, Activation, View, draft_view

__all__ = [
    "CASES",
    "HEAD_DIM",
    "PROMPT_CASES",
    "Case",
    "bench",
    "bytes_read",
    "rows_of",
    "shapes_of",
    "show",
]

READ_BYTES = 2 << 30
HEAD_DIM = 128  # where only [N, K] are known


@dataclass(frozen=True)
class Case:
    """One way to compute the linears of a layer.

    Attributes:
        target: how the weights are nested; None for cuBLAS with plain bf16 weights.
        view: what is read.
        pdl: programmatic dependent launch.
        tuning: another instance than the chosen one.
        is_prompt: rows of a prompt.
    """

    target: Target | None
    view: View = VERIFY
    pdl: bool = True
    tuning: Tuning | None = None
    is_prompt: bool = False


CASES = {
    "cublas": Case(None),
    "cublas again": Case(None),
    "verify bf16": Case(Target.BF16),
    "draft a8": Case(Target.BF16, draft_view(Activation.A8)),
    "verify int4": Case(Target.INT4),
    "draft a8 of int4": Case(Target.INT4, draft_view(Activation.A8)),
    "verify int8": Case(Target.INT8),
}
PROMPT_CASES = {
    name: replace(case, is_prompt=True)
    for name, case in CASES.items()
    if not case.view.is_draft  # prompts know no draft
}


def shapes_of(name: str) -> dict[str, tuple[int, int]]:
    """[N, K] of the four linears of one layer."""
    config = SHAPES[name]
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "qkv": (config.query_size + 2 * config.kv_size, hidden),
        "o": (hidden, config.query_size),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def bench(
    shape: str | dict[str, tuple[int, int]],
    rows: Sequence[int],
    *,
    cases: dict[str, Case] | None = None,
    group: int = 128,
    layers: int = 4,
    rounds: int = 20,
    is_apart: bool = False,
) -> dict[str, Any]:
    """Time every case at every number of rows.

    Args:
        shape: a model of `bench.shapes`, or [N, K] by name.
        rows: numbers of rows.
        cases: what to compare; `CASES` unless given. "cublas" must be among them.
        group: weights that share one scale.
        layers: layers a graph computes, each with its own weights.
        rounds: replays of each graph that count.
        is_apart: also time each of the linears in graphs of their own.

    Returns:
        Microseconds a layer by case and rows, and what surrounded them; ready for JSON.
    """
    linears = shapes_of(shape) if isinstance(shape, str) else shape
    cases = cases or CASES
    head_dim = SHAPES[shape].head_dim if isinstance(shape, str) else HEAD_DIM
    weights = _weights(linears, {case.target for case in cases.values()}, group, layers)
    memory = torch.ones(READ_BYTES, dtype=torch.uint8, device="cuda")
    results: list[dict[str, Any]] = []
    for count in rows:
        graphs: dict[str, tuple[Callable[[], None], int]] = {}
        for name, case in cases.items():
            parts = [[one] for one in linears] if is_apart else []
            for names in [list(linears), *parts]:
                label = name if len(names) == len(linears) else f"{name}: {names[0]}"
                repeats = 1 if len(names) == len(linears) else 4
                run = _runner(case, names, linears, weights[case.target], count, head_dim)
                graphs[label] = (captured(run, repeats), layers * repeats)
        graphs["read"] = (captured(lambda: read_memory(memory)), 1)
        times = _replay({name: graph for name, (graph, _) in graphs.items()}, rounds)
        for name, (_, num_layers) in graphs.items():
            median, least = times[name]
            results.append(
                {
                    "case": name,
                    "rows": count,
                    "us": median / num_layers,
                    "least_us": least / num_layers,
                    "against_cublas": median / num_layers / (times["cublas"][0] / layers),
                }
            )
        graphs.clear()
    read = min(row["us"] for row in results if row["case"] == "read")
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "shape": shape,
        "group": group,
        "layers": layers,
        "rounds": rounds,
        "read_tb_per_second": READ_BYTES / read / 1e6,
        "bytes_a_layer": {
            name: _bytes(case, linears, weights[case.target]) for name, case in cases.items()
        },
        "results": results,
    }


_Weights = list[dict[str, Tensor | PackedMatrix]]


def _weights(
    linears: dict[str, tuple[int, int]], targets: set[Target | None], group: int, layers: int
) -> dict[Target | None, _Weights]:
    """Gaussian weights, the same for every target; each layer has its own."""
    made: dict[Target | None, _Weights] = {target: [] for target in targets}
    for _ in range(layers):
        layer: dict[Target | None, dict[str, Tensor | PackedMatrix]] = {t: {} for t in targets}
        for name, (n, k) in linears.items():
            plain = torch.randn(n, k, device="cuda").mul_(k**-0.5).bfloat16()
            for target in targets:
                if target is None:
                    layer[target][name] = plain
                else:
                    layer[target][name] = pack(nest(plain, Recipe(target, group, clip_steps=1)))
        for target, found in layer.items():
            made[target].append(found)
    return made


def _runner(
    case: Case,
    names: list[str],
    linears: dict[str, tuple[int, int]],
    weights: _Weights,
    count: int,
    head_dim: int,
) -> Callable[[], None]:
    """Calls the linears of every layer once, on activations that lie ready."""
    rows = rows_of(case.is_prompt)
    specs = [one.spec for one in weights[0].values() if isinstance(one, PackedPlanes)]
    view = replace(case.view, group=draft_group(specs, head_dim))  # as such a model is read
    inputs: dict[str, Any] = {}
    outputs: dict[str, Tensor] = {}
    for name in names:
        n, k = linears[name]
        x = torch.randn(count, k, device="cuda").bfloat16()
        one: Any = weights[0][name]
        is_integer = case.target is not None and wants_integers(one, case.view)
        inputs[name] = quantize(x, view) if is_integer else x
        outputs[name] = torch.empty(count, n, dtype=torch.bfloat16, device="cuda")
    order = [(name, layer[name]) for layer in weights for name in names]

    def run() -> None:
        for name, weight in order:
            if isinstance(weight, Tensor):
                torch.mm(inputs[name], weight.t(), out=outputs[name])
                continue
            linear(
                inputs[name],
                weight,
                None,
                view,
                rows,
                out=outputs[name],
                pdl=case.pdl,
                chosen=case.tuning,
            )

    return run


def _replay(graphs: dict[str, Callable[[], None]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median and least microseconds of every graph, replayed in turn after three warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    event: Any = torch.cuda.Event
    before, after = event(enable_timing=True), event(enable_timing=True)
    for index in range(3 + rounds):
        for name, replay in graphs.items():
            before.record()
            replay()
            after.record()
            after.synchronize()
            if index >= 3:
                times[name].append(before.elapsed_time(after) * 1e3)
    return {name: (statistics.median(values), min(values)) for name, values in times.items()}


def rows_of(is_prompt: bool) -> Rows:
    """What `linear` looks at of rows: whether they are a prompt's."""
    some = torch.zeros(1, dtype=torch.int64)
    return Rows(some, some, some, some, some, is_prompt)


def bytes_read(packed: PackedMatrix, view: View) -> int:
    """Bytes of a packed matrix that a view reads."""
    buffers = packed.tensors()
    return buffers[0].nbytes if view.is_draft else sum(one.nbytes for one in buffers)


def _bytes(case: Case, linears: dict[str, tuple[int, int]], weights: _Weights) -> int:
    """Bytes of weights that a layer reads."""
    total = 0
    for name, (n, k) in linears.items():
        one = weights[0][name]
        total += n * k * 2 if isinstance(one, Tensor) else bytes_read(one, case.view)
    return total


def show(report: dict[str, Any]) -> str:
    """The report as a table: microseconds a layer, and that over cuBLAS."""
    rows = sorted({row["rows"] for row in report["results"]})
    names = list(dict.fromkeys(row["case"] for row in report["results"]))
    found = {(row["case"], row["rows"]): row for row in report["results"]}
    lines = [
        f"{report['device']}, {report['shape']}, groups of {report['group']}: memory is read at "
        f"{report['read_tb_per_second']:.2f} TB/s",
        f"{'microseconds a layer, rows':<34}" + "".join(f"{count:>14}" for count in rows),
    ]
    for name in names:
        cells = [found[name, count] for count in rows]
        text = (f"{cell['us']:8.1f} {cell['against_cublas']:4.2f}x" for cell in cells)
        lines.append(f"{name:<34}" + "".join(f"{cell:>14}" for cell in text))
    return "\n".join(lines)
