"""Kernels on a CPU: their CUDA C++, compiled by the host's compiler (emulated/)."""

import atexit
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qspec_llm.kernels.cuda.compile import SOURCES, addresses, arguments

EMULATED = Path(__file__).parent / "emulated"  # its ptx.cuh stands for that of the kernels
OPTIONS = (
    *("-std=c++17", "-O1", "-ffp-contract=off", "-w", "-Wno-psabi", "-fPIC", "-pthread"),
    *os.environ.get("QSPEC_EMULATED_OPTIONS", "").split(),  # as `make sanitize` wants them
)
MACHINE = "libmachine.so"
DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+) (\w+)\[\];")


@functools.cache
def _sources() -> Path:
    """All sources in one folder, without what no macro can turn into C++."""
    folder = Path(tempfile.mkdtemp(prefix="qspec-emulated-"))
    atexit.register(shutil.rmtree, folder)
    for path in (*SOURCES.glob("*.cu*"), *EMULATED.iterdir()):  # the latter over the former
        text = DYNAMIC_SHARED.sub(r"static DynamicShared<\1> \2;", path.read_text())
        (folder / path.name).write_text(text)
    # once for all
    _compile("-x", "c++-header", folder / "host.h")
    _compile("-shared", *sorted(folder.glob("*.cpp")), "-o", folder / MACHINE)
    return folder


def _compile(*args: str | Path) -> None:
    subprocess.run(["g++", *OPTIONS, *map(str, args)], check=True)


@functools.cache
def _compiled(source: str, function: str, defines: tuple[tuple[str, str], ...]) -> Any:
    """The function `emulate` of launch.h for one kernel."""
    macros = [("SOURCE", f'"{source}"'), ("KERNEL", function), *defines]
    lines = ['#include "host.h"', *(f"#define {name} {value}" for name, value in macros)]
    text = "\n".join([*lines, '#include "launch.h"', ""])
    unit = _sources() / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    unit.write_text(text)
    library = unit.with_suffix(".so")
    _compile("-shared", unit, unit.with_name(MACHINE), "-Wl,-rpath,$ORIGIN", "-o", library)
    emulate = ctypes.CDLL(str(library)).emulate
    emulate.restype = ctypes.c_char_p
    return emulate


def tensor_map(matrix: Tensor, box: tuple[int, int]) -> Any:
    """Stands for `compile.tensor_map`: emulated/ptx.cuh reads it."""
    assert box[1] * matrix.itemsize == 128
    row_bytes = matrix.stride(0) * matrix.itemsize
    words = [matrix.data_ptr(), *matrix.shape, row_bytes, matrix.itemsize, box[0]]
    return (ctypes.c_uint64 * 16)(*words)


class Emulated:
    """Stands for `compile.Kernel`, with tensors on a CPU.

    With `at_once` all blocks run at a time, as on a GPU that has room for them, so that they may
    wait for each other; else a cluster after another, unless a launch is cooperative.
    """

    def __init__(
        self, source: str, function: str, seed: int, *, at_once: bool = False, **defines: object
    ) -> None:
        items = tuple(sorted((name, str(value)) for name, value in defines.items()))
        self._emulate, self._seed = _compiled(source, function, items), seed
        self._at_once = at_once

    def launch(
        self,
        grid: tuple[int, ...],
        block: int,
        args: Sequence[Any],
        *,
        smem: int = 0,
        cluster: int = 1,
        pdl: bool = False,
        cooperative: bool = False,
    ) -> None:
        """Run all blocks to their end.

        Raises:
            AssertionError: the kernel reads or writes outside of shared memory, traps or hangs.
        """
        values = arguments(args)
        pointers = addresses(values)
        sizes = (ctypes.c_int * 3)(*(*grid, 1, 1)[:3])
        smem_bytes, seed = ctypes.c_size_t(smem), ctypes.c_uint(self._seed)
        at_once = int(cooperative or self._at_once)
        why = self._emulate(pointers, sizes, block, smem_bytes, cluster, at_once, seed)
        assert why is None, why.decode()
