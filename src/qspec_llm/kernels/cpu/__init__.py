"""The CPU backend: C++ kernels for AVX-512 (VNNI), AVX2 or any processor, chosen at run time.

    layout.py    how stored planes are arranged, and back
    ops.py       the operations of the contract: checks, then C++
    step.py      a whole forward pass as one call
    threads.py   how many threads
    module.cpp   the binding; ops.cpp and step.cpp what it calls; stages.cpp what threads share out
    isa_*.cpp    the kernels (linear.inl, rows.inl, attention.inl) compiled for one ISA each

Values are float32 between the operations' roundings. A row's result has one order of accumulation
for each ISA, whatever the number of rows or threads.
"""

import torch

from qspec_llm.errors import QSpecError

try:
    from qspec_llm.kernels.cpu import _cpu
except ImportError as error:
    raise QSpecError(
        "the CPU backend was not built when qspec-llm was installed: install a C++17 compiler and "
        "reinstall qspec-llm, or use backend 'reference'"
    ) from error

from qspec_llm.kernels.cpu._cpu import available_isas, isa, set_isa
from qspec_llm.kernels.cpu.layout import pack, unpack
from qspec_llm.kernels.cpu.ops import (
    attention,
    buffers,
    check,
    embed,
    hadamard,
    linear,
    read_memory,
    rms_norm,
    rope,
    silu_mul,
    write_kv,
)
from qspec_llm.kernels.cpu.step import whole_step
from qspec_llm.kernels.cpu.threads import configure, num_threads, physical_cores, set_num_threads

__all__ = [
    "attention",
    "available_isas",
    "buffers",
    "check",
    "configure",
    "device",
    "embed",
    "hadamard",
    "isa",
    "linear",
    "name",
    "num_threads",
    "pack",
    "physical_cores",
    "read_memory",
    "rms_norm",
    "rope",
    "set_isa",
    "set_num_threads",
    "silu_mul",
    "unpack",
    "whole_step",
    "write_kv",
]

name = "cpu"
device = torch.device("cpu")

_cpu.set_num_threads(physical_cores())
