"""What a captured call keeps and how it is timed, without a GPU: torch's graphs are stood for."""

import contextlib
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qspec_llm.engine import costs
from qspec_llm.engine.captured import REPEATS, captured, gpu_seconds
from qspec_llm.weights.view import Activation, draft_view


class Graph:
    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


class Event:
    """The time is the number of replays: one takes a millisecond."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Graph.replays

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return float(other.at - self.at)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "replays", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_a_captured_call_keeps_what_its_graph_reads() -> None:
    rows = torch.arange(3)
    is_kept = weakref.ref(rows)
    replay = captured(rows.sum)
    del rows
    gc.collect()
    replay()
    assert is_kept() is not None
    assert Graph.replays == 1


def test_a_call_is_in_the_graph_as_often_as_asked_for() -> None:
    calls: list[None] = []
    captured(lambda: calls.append(None), 16)
    assert len(calls) == 1 + 16  # and once before


def test_the_first_of_several_is_not_timed() -> None:
    assert gpu_seconds(captured(lambda: None)) == pytest.approx(1e-3)
    assert Graph.replays == 1 + REPEATS


def test_costs_on_a_gpu_are_those_of_captured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs._CapturedSteps, "_forward", lambda *_: lambda: None)
    device = SimpleNamespace(type="cuda")
    decoder = SimpleNamespace(ops=SimpleNamespace(device=device), cos=torch.zeros(2048, 1))
    runner: Any = SimpleNamespace(decoder=decoder, kv=[SimpleNamespace(keys=torch.zeros(2048, 1))])
    tokenizer: Any = None
    found = costs.measure_costs(runner, tokenizer, draft_view(Activation.A8), 4)
    assert found.batches == (1, 2, 4)
    assert found.draft == pytest.approx((1e-3,) * 3)
    assert {round(step, 9) for steps in found.verify for step in steps} == {1e-3}
