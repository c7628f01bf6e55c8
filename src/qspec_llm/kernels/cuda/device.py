"""Which GPU the backend runs on, and why it does not where it cannot."""

import importlib.util
from functools import cache

import torch
import torch.version

from qspec_llm.errors import QSpecError

__all__ = ["can_overlap", "gpu", "is_interpreted", "require_gpu"]

LEAST_CAPABILITY = (8, 0)  # Ampere: bf16 matrix instructions
PACKAGES = ("triton", "cuda")  # what compiles the kernels


@cache
def is_interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU (TRITON_INTERPRET=1), for tests."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def gpu() -> torch.device:
    """The GPU that torch calls current when it is first asked for."""
    return torch.device("cpu" if is_interpreted() else f"cuda:{torch.cuda.current_device()}")


@cache
def can_overlap() -> bool:
    """Whether this GPU knows programmatic dependent launch (kernels/triton/launch.py)."""
    return not is_interpreted() and torch.cuda.get_device_capability() >= (9, 0)


def require_gpu() -> None:
    """Nothing, where the backend can run.

    Raises:
        QSpecError: it cannot; the sentence says what is missing.
    """
    if is_interpreted():
        return
    if torch.version.cuda is None:
        raise QSpecError(
            f"backend 'cuda' needs a PyTorch with CUDA, and {torch.__version__} has none; install "
            "one, or use backend 'cpu'"
        )
    if not torch.cuda.is_available():
        raise QSpecError(
            "backend 'cuda' finds no NVIDIA GPU with a working driver; use backend 'cpu'"
        )
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        raise QSpecError(
            f"backend 'cuda' needs compute capability 8.0 (Ampere) or later; "
            f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
        )
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise QSpecError(
                f"backend 'cuda' needs the package {package!r}, which is not installed; "
                "pip install 'qspec-llm[cuda]' brings it"
            )
