"""What one step costs: draft and verify, by rows and context, and what that lets drafting gain.

With c a draft step and v(gamma) a verify step of gamma + 1 rows, both in plain steps, and a the
chance that a draft is accepted, a cycle makes E = (1 - a^(gamma+1)) / (1 - a) tokens and costs
gamma c + v(gamma): the speed-up is their ratio (Leviathan et al. 2023, theorem 3.8, with a verify
step that is not free of gamma).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, product
from typing import Any, cast

import torch
from torch import Tensor

from qspec_llm.bench.measure import Advance, host_seconds, interleaved, wake_gpu
from qspec_llm.engine.captured import captured, gpu_seconds, rows_after
from qspec_llm.engine.engine import Engine, StepSeconds
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.runner import Runner
from qspec_llm.engine.text import Tokenizer
from qspec_llm.kv.blocks import blocks_for
from qspec_llm.kv.pool import allocate
from qspec_llm.model.decoder import Decoder
from qspec_llm.weights.view import VERIFY, Activation, View, draft_view

__all__ = ["ACCEPTANCES", "StepCase", "Steps", "best_gamma", "host_share", "summarise"]

ACCEPTANCES = (0.7, 0.8, 0.9, 0.95)
MAX_GAMMA = 15  # a verify step of 16 rows is the largest measured


@dataclass(frozen=True)
class StepCase:
    """One step, in one view of one target.

    Attributes:
        target: what the verify view computes.
        view: draft or verify.
        rows: of each sequence.
        context: tokens that each sequence has before them.
        batch: sequences.
    """

    target: str
    view: View
    rows: int
    context: int
    batch: int = 1


class Steps:
    """Steps that are ready to be timed: on a GPU captured graphs, as the engine runs them.

    Every sequence has keys and values of its own, random ones.

    Args:
        decoders: one a target; they need equal configurations.
        draft: activations of the draft view.
        rows: rows of a sequence in the verify steps; in draft steps it has one.
        contexts: tokens already in the cache.
        batches: sequences of a step.
    """

    def __init__(
        self,
        decoders: Mapping[str, Decoder],
        draft: Activation,
        rows: Sequence[int],
        contexts: Sequence[int],
        batches: Sequence[int] = (1,),
    ) -> None:
        self._decoders = decoders
        one = next(iter(decoders.values()))
        self._device = one.ops.device
        capacity = max(batches) * blocks_for(max(contexts) + max(rows))
        self._kv = {
            target: allocate(decoder.config, capacity, decoder.dtype, self._device)
            for target, decoder in decoders.items()
        }
        generator = torch.Generator(self._device).manual_seed(0)
        for layer in chain.from_iterable(self._kv.values()):
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)
        views = [(draft_view(draft), 1), *((VERIFY, count) for count in rows)]
        self.cases = [
            StepCase(target, view, count, context, batch)
            for target, context, batch in product(decoders, contexts, batches)
            for view, count in views
        ]
        self._clock = host_seconds
        self._calls = {case: self._call(case) for case in self.cases}
        if self._device.type == "cuda":
            self._clock = gpu_seconds
            wake_gpu(self._calls.values())

    def seconds(self, rounds: int, advance: Advance | None = None) -> dict[StepCase, float]:
        """Median seconds of every step, all interleaved; `advance` is called after each."""
        return interleaved(self._calls, rounds, advance, self._clock)

    def round(self) -> list[float]:
        """Seconds of every step, each run once, in the order of `cases`."""
        return [self._clock(call) for call in self._calls.values()]

    def bits(self) -> list[str]:
        """A hash of the logits of every step: those of equal computations are equal."""
        return [self._hash_of(case) for case in self.cases]

    def _hash_of(self, case: StepCase) -> str:
        logits = self._forward(case)().cpu().contiguous()
        return blake2b(logits.numpy().tobytes(), digest_size=12).hexdigest()

    def _call(self, case: StepCase) -> Callable[[], object]:
        """A step to time."""
        forward = self._forward(case)
        return forward if self._device.type != "cuda" else captured(forward)

    def _forward(self, case: StepCase) -> Callable[[], Tensor]:
        rows = rows_after(case.context, case.rows, case.batch, is_apart=True)
        tokens = rows.positions % 97
        wanted = None
        if self._device.type == "cuda":
            tokens, rows = tokens.to(self._device), rows.to(self._device)
        else:
            wanted = torch.arange(len(tokens))
        decoder, kv = self._decoders[case.target], self._kv[case.target]

        def forward() -> Tensor:
            with torch.inference_mode():
                return decoder.forward(tokens, rows, kv, case.view, wanted)

        return forward


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


def summarise(seconds: Mapping[StepCase, float], draft: Activation) -> list[dict[str, Any]]:
    """c, v and the implied gammas of each target and batch, at the shortest context measured."""
    context = min(case.context for case in seconds)
    found = []
    for target, batch in dict.fromkeys((case.target, case.batch) for case in seconds):
        plain = seconds[StepCase(target, VERIFY, 1, context, batch)]
        c = seconds[StepCase(target, draft_view(draft), 1, context, batch)] / plain
        v = {
            case.rows: value / plain
            for case, value in seconds.items()
            if case == StepCase(target, VERIFY, case.rows, context, batch)
        }
        best = {a: best_gamma(a, c, v) for a in ACCEPTANCES}
        implied = {str(a): {"gamma": g, "speedup": s} for a, (g, s) in best.items()}
        found.append(
            {
                "target": target,
                "batch": batch,
                "context": context,
                "c": c,
                "v": v,
                "implied": implied,
            }
        )
    return found
