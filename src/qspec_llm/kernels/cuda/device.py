"""Which GPU the backend runs on, and why it does not where it cannot."""

import importlib.util
from functools import cache

import torch
import torch.version

from qspec_llm.errors import QSpecError

__all__ = ["gpu", "require_gpu"]

LEAST_CAPABILITY = (8, 0)  # Ampere: bf16 matrix instructions


@cache
def gpu() -> torch.device:
    """The GPU that torch calls current when it is first asked for."""
    from qspec_llm.kernels.triton.launch import IS_INTERPRETED

    return torch.device("cpu" if IS_INTERPRETED else f"cuda:{torch.cuda.current_device()}")


def require_gpu() -> None:
    """Nothing, where the backend can run.

    Raises:
        QSpecError: it cannot; the sentence says what is missing.
    """
    if importlib.util.find_spec("triton") is None:
        raise QSpecError("backend 'cuda' needs the package triton, which is not installed")
    import triton

    if triton.knobs.runtime.interpret:  # tests of the kernels' meaning, on the CPU
        return
    if torch.version.cuda is None:
        raise QSpecError(
            f"backend 'cuda' needs a PyTorch with CUDA, and {torch.__version__} has none"
        )
    if not torch.cuda.is_available():
        raise QSpecError("backend 'cuda' finds no NVIDIA GPU with a working driver")
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        raise QSpecError(
            f"backend 'cuda' needs compute capability 8.0 (Ampere) or later; "
            f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
        )
