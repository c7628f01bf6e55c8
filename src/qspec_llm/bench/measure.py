"""Timing that can be believed on a noisy machine.

What is compared runs in turn, A B C A B C ..., so that drift hits all alike; the median of the
rounds counts. Absolute times belong to the machine and the moment; ratios within one run travel.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from qspec_llm.engine.emit import Emission
from qspec_llm.engine.engine import Engine, StepSeconds

__all__ = [
    "WARM_UP_ROUNDS",
    "Advance",
    "host_seconds",
    "interleaved",
    "run_in_turn",
    "wake_gpu",
    "warm_up",
]

_Key = TypeVar("_Key", bound=Hashable)
Advance = Callable[[], None]  # called after every timed call, for a progress bar

WARM_UP_ROUNDS = 1


def host_seconds(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def wake_gpu(calls: Iterable[Callable[[], object]], seconds: float = 1.0) -> None:
    """Keep the GPU busy until its clocks are up: an idle one starts at a fraction of them."""
    calls, started = list(calls), time.perf_counter()
    while time.perf_counter() - started < seconds:
        for call in calls:
            call()
        torch.cuda.synchronize()


def interleaved(
    cases: Mapping[_Key, Callable[[], object]],
    rounds: int,
    advance: Advance | None = None,
    clock: Callable[[Callable[[], object]], float] = host_seconds,
) -> dict[_Key, float]:
    """Median seconds of each case over `rounds` rounds of all of them, after a warm-up round."""
    seconds: dict[_Key, list[float]] = {key: [] for key in cases}
    for index in range(WARM_UP_ROUNDS + rounds):
        for key, call in cases.items():
            elapsed = clock(call)
            if index >= WARM_UP_ROUNDS:
                seconds[key].append(elapsed)
            if advance is not None:
                advance()
    return {key: statistics.median(values) for key, values in seconds.items()}


def run_in_turn(
    engines: Sequence[Engine], on_emit: Callable[[Engine, list[Emission]], None] | None = None
) -> None:
    """Step engines until all are done; whichever has used the least time so far goes next.

    Their times, `Engine.seconds`, are then comparable: each step had the machine to itself, and
    slow moments of the machine were shared out. Engines that launch cycles ahead of the host would
    wait for each other's: they go one after the other. All are of one kind.
    """
    while waiting := [engine for engine in engines if engine.has_work]:
        runs_ahead = waiting[0].cycles is not None
        engine = waiting[0] if runs_ahead else min(waiting, key=lambda one: one.seconds.total)
        emissions = engine.step()
        if on_emit is not None:
            on_emit(engine, emissions)
        if runs_ahead and not engine.has_work:
            torch.cuda.synchronize()  # a cycle may have been launched that nobody needs


def warm_up(engines: Sequence[Engine], submit: Callable[[Engine], object]) -> None:
    """Do what will be timed once before, where cycles are captured when they are first needed.

    Args:
        engines: all idle.
        submit: adds the requests that will be timed.
    """
    if all(engine.cycles is None for engine in engines):
        return
    for engine in engines:
        submit(engine)
    run_in_turn(engines)
    for engine in engines:
        engine.seconds = StepSeconds()
