"""Where the cuda backend cannot run, one sentence says why."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers_weights import refused
from qspec_llm.kernels import available_backends
from qspec_llm.kernels.cuda import device


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this machine one with a GPU, less what the arguments say."""

    def make(
        *,
        cuda: str | None = "13.0",
        is_available: bool = True,
        capability: tuple[int, int] = (9, 0),
        packages: tuple[str, ...] = device.PACKAGES,
    ) -> None:
        def find_spec(name: str) -> Any:
            return object() if name in packages else None

        monkeypatch.setattr(device, "is_interpreted", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    return make


def test_a_machine_with_all_it_needs(machine: Callable[..., None]) -> None:
    machine()
    device.require_gpu()


@pytest.mark.parametrize(
    ("lack", "words"),
    [
        ({"cuda": None}, ["PyTorch with CUDA", torch.__version__, "'cpu'"]),
        ({"is_available": False}, ["no NVIDIA GPU", "driver", "'cpu'"]),
        ({"capability": (7, 5)}, ["8.0", "Test GPU", "7.5"]),
        ({"packages": ("cuda",)}, ["'triton'", "qspec-llm[cuda]"]),
        ({"packages": ("triton",)}, ["'cuda'", "qspec-llm[cuda]"]),
    ],
)
def test_what_is_missing_is_named(
    lack: dict[str, Any], words: list[str], machine: Callable[..., None]
) -> None:
    machine(**lack)
    with refused(*words):
        device.require_gpu()


def test_backends_that_run_are_found_without_a_gpu() -> None:
    found = available_backends()
    assert "reference" in found
    assert ("cuda" in found) == (torch.cuda.is_available() or device.is_interpreted())
