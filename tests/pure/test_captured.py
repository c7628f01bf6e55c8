"""What a captured call keeps, without a GPU: torch's graphs are stood for."""

import contextlib
import gc
import weakref

import pytest
import torch

from qspec_llm.engine.captured import captured


class Graph:
    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


def test_a_captured_call_keeps_what_its_graph_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    rows = torch.arange(3)
    is_kept = weakref.ref(rows)
    replay = captured(rows.sum)
    del rows
    gc.collect()
    replay()
    assert is_kept() is not None
    assert Graph.replays == 1
