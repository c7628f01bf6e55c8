"""How many threads the kernels use."""

import os
from pathlib import Path

from qspec_llm.errors import QSpecError
from qspec_llm.kernels.cpu import _cpu

__all__ = ["configure", "num_threads", "physical_cores", "set_num_threads"]


def physical_cores() -> int:
    """Cores that this process may run on, hardware threads of one core counted once."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, (os.cpu_count() or 2) // 2)
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def num_threads() -> int:
    """Threads that the kernels use."""
    return _cpu.num_threads()


def configure(num_threads: int | None, isa: str | None) -> None:
    """Set threads and instruction set for the whole process; None leaves what is."""
    if num_threads is not None:
        set_num_threads(num_threads)
    if isa is not None:
        if isa not in _cpu.available_isas():
            known = ", ".join(_cpu.available_isas())
            raise QSpecError(f"isa {isa!r} does not run here; this machine runs {known}")
        _cpu.set_isa(isa)


def set_num_threads(count: int) -> None:
    """Use `count` threads; no kernel may be running.

    Raises:
        QSpecError: it is not positive.
    """
    if count < 1:
        raise QSpecError(f"the number of threads is {count}; it must be at least 1")
    _cpu.set_num_threads(count)
