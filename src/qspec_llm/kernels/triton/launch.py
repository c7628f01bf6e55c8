"""How these kernels are launched.

On Hopper and later a kernel may start while the one before it still runs (programmatic dependent
launch): each of ours lets the next one start at once and waits for the one before it before it
touches memory that another kernel writes. So launch latency and the next linear's first weights
hide behind the small kernels. As every kernel waits, the order is as if none overlapped.
"""

from typing import Any

import triton
import triton.language as tl

from qspec_llm.kernels.cuda.device import can_overlap

__all__ = ["IS_INTERPRETED", "NO_FUSED_MULTIPLY", "next_power", "options", "start"]

# TRITON_INTERPRET=1: kernels run on the CPU, slowly, for tests of what they mean
IS_INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

# for kernels whose products must be rounded one by one
NO_FUSED_MULTIPLY: dict[str, Any] = {} if IS_INTERPRETED else {"enable_fp_fusion": False}


def options(num_warps: int, num_stages: int = 2) -> dict[str, Any]:
    """Keyword arguments of a launch, the kernel's own `OVERLAP` among them."""
    if IS_INTERPRETED:
        return {"OVERLAP": False}
    return {
        "OVERLAP": can_overlap(),
        "launch_pdl": can_overlap(),
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def next_power(size: int, least: int = 1) -> int:
    """The power of two that holds `size`, at least `least`."""
    return max(least, 1 << (size - 1).bit_length())


@triton.jit
def start(OVERLAP: tl.constexpr):
    """Let the next kernel start, then wait for the one before."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
