"""Shared by all tests: quiet libraries, and skips with their reason.

Three bins: pure tests need nothing, kernel tests need a backend, tests marked `weights` need the
default model. Collecting never loads a model.
"""

import os

# Before transformers is imported by anyone: no progress bars, no network, no advice on stderr.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from qspec_llm.errors import QSpecError
from qspec_llm.hub import resolve_model
from qspec_llm.kernels import BACKENDS, available_backends

if TYPE_CHECKING:
    from qspec_llm.weights.checkpoint import Checkpoint


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_soak_asked_for = "soak" in (config.option.markexpr or "")
    no_weights = _why_no_weights()
    # Triton's interpreter stands in for a GPU where it is asked for (tests/kernels/test_gpu.py)
    has_gpu = torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ
    for item in items:
        if no_weights and "weights" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=no_weights))
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if "soak" in item.keywords and not is_soak_asked_for:
            item.add_marker(pytest.mark.skip(reason="a soak test; ask for it with -m soak"))


def _why_no_weights() -> str:
    try:
        resolve_model("smollm2")
    except QSpecError as error:
        return str(error)
    return ""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests are many and small: threads that wait for each other on a busy machine cost 50x."""
    torch.set_num_threads(1)


# the cuda backend's cases carry the mark `gpu`, and are skipped where there is no GPU
BACKEND_CASES = [
    pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name for name in BACKENDS
]


@pytest.fixture(scope="module", params=BACKEND_CASES)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; one that was not built is skipped."""
    if request.param not in available_backends():
        pytest.skip(f"backend {request.param!r} does not run here")
    return str(request.param)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's GGUF file."""
    return resolve_model("smollm2")


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2: Path) -> "Checkpoint":
    """The default model, opened once: reading its header takes seconds."""
    from qspec_llm.weights.checkpoint import open_checkpoint

    return open_checkpoint(smollm2)
