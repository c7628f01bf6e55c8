"""What one step costs: draft and verify, by rows and context, and what that lets drafting gain.

With c a draft step and v(gamma) a verify step of gamma + 1 rows, both in plain steps, and a the
chance that a draft is accepted, a cycle makes E = (1 - a^(gamma+1)) / (1 - a) tokens and costs
gamma c + v(gamma): the speed-up is their ratio (Leviathan et al. 2023, theorem 3.8, with a verify
step that is not free of gamma).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from qspec_llm.bench.measure import Advance, host_seconds, interleaved, wake_gpu
from qspec_llm.engine.captured import captured, gpu_seconds, rows_after
from qspec_llm.engine.engine import Engine, StepSeconds
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.runner import Runner
from qspec_llm.engine.text import Tokenizer
from qspec_llm.kernels import LayerKV, Rows
from qspec_llm.kv.blocks import blocks_for
from qspec_llm.kv.pool import allocate
from qspec_llm.model.decoder import Decoder
from qspec_llm.weights.view import VERIFY, Activation, View, draft_view

__all__ = ["ACCEPTANCES", "StepCase", "best_gamma", "host_share", "step_costs", "summarise"]

ACCEPTANCES = (0.7, 0.8, 0.9, 0.95)
MAX_GAMMA = 15  # a verify step of 16 rows is the largest measured


@dataclass(frozen=True)
class StepCase:
    """One step: `rows` rows of one sequence after `context` tokens, in one view of one target."""

    target: str
    view: View
    rows: int
    context: int


def step_costs(
    decoders: Mapping[str, Decoder],
    draft: Activation,
    rows: Sequence[int],
    contexts: Sequence[int],
    rounds: int,
    advance: Advance | None = None,
) -> dict[StepCase, float]:
    """Median seconds of every step, all targets interleaved.

    Args:
        decoders: one a target; they need equal configurations.
        draft: activations of the draft view.
        rows: rows of the verify steps; draft steps have one.
        contexts: tokens already in the cache.
        rounds: rounds that count.
        advance: called after each step.
    """
    calls = {}
    for target, decoder in decoders.items():
        capacity = max(contexts) + max(rows)
        kv = allocate(decoder.config, blocks_for(capacity), decoder.dtype, decoder.ops.device)
        for context in contexts:
            cases = [(draft_view(draft), 1), *((VERIFY, n) for n in rows)]
            for view, num_rows in cases:
                case = StepCase(target, view, num_rows, context)
                calls[case] = _call(decoder, kv, case)
    on_gpu = next(iter(decoders.values())).ops.device.type == "cuda"
    if on_gpu:
        wake_gpu(calls.values())
    return interleaved(calls, rounds, advance, gpu_seconds if on_gpu else host_seconds)


def _call(decoder: Decoder, kv: tuple[LayerKV, ...], case: StepCase) -> Callable[[], None]:
    """A step to time: on a GPU a captured graph, as the engine runs it."""
    device = decoder.ops.device
    tokens, rows = _inputs(case)
    if device.type != "cuda":
        wanted = torch.arange(case.rows)
        return partial(_step, decoder, kv, case.view, tokens, rows, wanted)
    return captured(
        partial(_step, decoder, kv, case.view, tokens.to(device), rows.to(device), None)
    )


def _inputs(case: StepCase) -> tuple[Tensor, Rows]:
    """Tokens and rows of a step."""
    rows = rows_after(case.context, case.rows)
    return rows.positions % 97, rows


def _step(
    decoder: Decoder,
    kv: tuple[LayerKV, ...],
    view: View,
    tokens: Tensor,
    rows: Rows,
    wanted: Tensor | None,
) -> None:
    with torch.inference_mode():
        decoder.forward(tokens, rows, kv, view, wanted)


class _Timed:
    """A decoder that sums up the seconds of its forward passes."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def forward(self, *args: Any) -> Tensor:
        started = time.perf_counter()
        logits = self._decoder.forward(*args)
        self.seconds += time.perf_counter() - started
        return logits


def host_share(decoder: Decoder, tokenizer: Tokenizer, num_steps: int) -> float:
    """Share of plain engine steps of one request that is spent outside `Decoder.forward`."""
    capacity = blocks_for(64 + num_steps)
    timed = _Timed(decoder)
    runner = Runner(
        cast(Decoder, timed),
        allocate(decoder.config, capacity, decoder.dtype, decoder.ops.device),
    )
    engine = Engine(runner, tokenizer, draft_view(Activation.A8), gamma=0, max_batch=1)
    params = SamplingParams(temperature=0, max_tokens=num_steps, ignore_eos=True)
    engine.add([1] * 32, params)
    engine.step()  # the prompt
    engine.seconds, timed.seconds = StepSeconds(), 0.0
    while engine.has_work:
        engine.step()
    return 1 - timed.seconds / engine.seconds.total


def best_gamma(acceptance: float, c: float, v: Mapping[int, float]) -> tuple[int, float]:
    """The gamma with the highest speed-up, and the speed-up.

    Args:
        acceptance: chance that a tested draft is accepted.
        c: a draft step, in plain steps.
        v: verify steps in plain steps, by number of rows; others are interpolated.
    """

    def speedup(gamma: int) -> float:
        tokens = sum(acceptance**i for i in range(gamma + 1))
        return tokens / (gamma * c + _interpolate(v, gamma + 1))

    gamma = max(range(min(MAX_GAMMA, max(v) - 1) + 1), key=speedup)
    return gamma, speedup(gamma)


def _interpolate(v: Mapping[int, float], rows: int) -> float:
    below = max(n for n in v if n <= rows)
    above = min(n for n in v if n >= rows)
    if below == above:
        return v[rows]
    return v[below] + (v[above] - v[below]) * (rows - below) / (above - below)


def summarise(seconds: Mapping[StepCase, float], draft: Activation) -> dict[str, Any]:
    """c, v and the implied gammas of each target, from the shortest context measured."""
    context = min(case.context for case in seconds)
    c, v, implied = {}, {}, {}
    for target in dict.fromkeys(case.target for case in seconds):
        plain = seconds[StepCase(target, VERIFY, 1, context)]
        c[target] = seconds[StepCase(target, draft_view(draft), 1, context)] / plain
        v[target] = {
            case.rows: value / plain
            for case, value in seconds.items()
            if (case.target, case.view, case.context) == (target, VERIFY, context)
        }
        best = {a: best_gamma(a, c[target], v[target]) for a in ACCEPTANCES}
        implied[target] = {str(a): {"gamma": g, "speedup": s} for a, (g, s) in best.items()}
    return {"c": c, "v": v, "implied": implied}
