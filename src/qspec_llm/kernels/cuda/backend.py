"""The GPU backend's names of `kernels.Backend`. Importing this module fails where it cannot run."""

from qspec_llm.kernels.cuda.device import gpu, require_gpu

require_gpu()

from qspec_llm.kernels.cuda.check import check_packed as check  # noqa: E402
from qspec_llm.kernels.cuda.matrices import buffers, embed, linear, pack, read_memory, unpack  # noqa: E402
from qspec_llm.kernels.cuda.ops import (  # noqa: E402
    attention,
    configure,
    hadamard,
    num_threads,
    rms_norm,
    rope,
    silu_mul,
    write_kv,
)
from qspec_llm.kernels.cuda.step import whole_step  # noqa: E402

__all__ = [
    "attention",
    "buffers",
    "check",
    "configure",
    "device",
    "embed",
    "hadamard",
    "linear",
    "name",
    "num_threads",
    "pack",
    "read_memory",
    "rms_norm",
    "rope",
    "silu_mul",
    "unpack",
    "whole_step",
    "write_kv",
]

name = "cuda"
device = gpu()
