"""Engines that are compared take turns: by the step or, where they run ahead, one by one."""

from typing import Any

import pytest
import torch

from qspec_llm.bench import decode, measure
from qspec_llm.engine.engine import StepSeconds
from qspec_llm.engine.params import SamplingParams


class Request:
    """One that four steps finish."""

    def __init__(self) -> None:
        self.output: list[int] = []
        self.num_tested, self.num_accepted = 4, 3


class Engine:
    """Takes a second for a step of its own, and logs it."""

    def __init__(self, name: str, log: list[str], cycles: object) -> None:
        self.name, self.log, self.cycles = name, log, cycles
        self.seconds = StepSeconds()
        self._requests: list[Request] = []

    @property
    def has_work(self) -> bool:
        return any(len(one.output) < 4 for one in self._requests)

    def add(self, prompt: list[int], params: SamplingParams) -> Request:
        self._requests.append(Request())
        return self._requests[-1]

    def step(self) -> list[Any]:
        self.log.append(self.name)
        self.seconds.other += {"c": 0.5}.get(self.name, 1.0)
        next(one for one in self._requests if len(one.output) < 4).output.append(7)
        return []


@pytest.fixture
def synchronized(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    calls: list[None] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append(None))
    return calls


def decoded(cycles: object) -> tuple[decode.TargetResult, str]:
    log: list[str] = []
    names = iter("abc")

    def new_engine(gamma: object) -> Any:
        return Engine(next(names), log, cycles)

    result = decode.decode(new_engine, [[1]], SamplingParams(), 3)
    return result, "".join(log)


def test_steps_take_turns(synchronized: list[None]) -> None:
    result, order = decoded(cycles=None)
    assert order == "abccabccabab"  # c's take half as long
    assert not synchronized
    assert (result.speedup, result.aa_ratio, result.identical) == (2, 1, True)
    assert result.acceptance_rate == 0.75


def test_engines_that_run_ahead_go_one_after_the_other(synchronized: list[None]) -> None:
    """First once to capture what they will need, which does not count."""
    result, order = decoded(cycles=object())
    rounds = 1 + decode.ROUNDS_OF_CYCLES
    assert order == "aaaabbbbcccc" * rounds
    assert len(synchronized) == 3 * rounds
    assert (result.plain_tokens_per_second, result.speculative_tokens_per_second) == (1, 2)
    assert (result.aa_ratio, result.identical) == (1, True)


def test_nothing_is_warmed_up_that_captures_nothing() -> None:
    engine: Any = Engine("a", [], None)
    measure.warm_up([engine], lambda one: pytest.fail(f"{one} has nothing to capture"))
