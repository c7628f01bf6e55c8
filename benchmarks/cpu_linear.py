"""Linears of the CPU backend against the memory: one process, interleaved, rotating past the cache.

    python benchmarks/cpu_linear.py [--rows 1,5] [--shape 9728x896] [--group 32] [--rounds 15]

Prints microseconds (median of rounds and best), GB/s of the bytes that the view reads and the share
of the read bandwidth measured in the same rounds. `dense bf16` is the plain kernel to compare with.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from qspec_llm.kernels import Rows, cpu
from qspec_llm.kernels.cpu import _cpu
from qspec_llm.weights.planes import Dense, Grid, Planes, PlaneSpec, Stored
from qspec_llm.weights.view import VERIFY, Activation, View, draft_view

ROTATE_BYTES = 640 << 20


def random_planes(spec: PlaneSpec) -> Planes:
    tensors = {
        name: torch.randint(0, 256, shape, dtype=dtype)
        if dtype is torch.uint8
        else torch.full(shape, 0.01).to(dtype)
        for name, (shape, dtype) in spec.shapes().items()
    }
    if spec.bits == 16:
        tensors["r4"] = (tensors["r4"] & 0x11) | 0xCC
    return Planes.from_tensors(spec, tensors)


def clone(packed: cpu.layout.PackedMatrix) -> cpu.layout.PackedMatrix:
    return cpu.pack(cpu.unpack(packed))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="1,5")
    parser.add_argument("--shape", default="9728x896,4096x4096")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=cpu.physical_cores())
    parser.add_argument("--isa", default=cpu.isa())
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    cpu.set_num_threads(args.threads)
    cpu.set_isa(args.isa)
    print(f"{cpu.isa()}, {args.threads} threads, groups of {args.group}")
    for shape in args.shape.split(","):
        n, k = map(int, shape.split("x"))
        for rows in map(int, args.rows.split(",")):
            bench(n, k, rows, args.group, args.rounds, args.only.split(",") if args.only else [])


def bench(n: int, k: int, num_rows: int, group: int, rounds: int, only: list[str]) -> None:
    signed16 = PlaneSpec(n, k, group=group, bits=16, grid=Grid.SIGNED)
    signed8 = replace(signed16, bits=8)
    affine4 = PlaneSpec(n, k, group=group, bits=4, grid=Grid.AFFINE, has_offset=True)
    draft = draft_view(Activation.A8)
    forms: dict[str, tuple[Callable[[], Stored], View]] = {
        "dense bf16": (lambda: Dense(torch.randn(n, k).bfloat16(), "plain"), VERIFY),
        "bf16 verify": (lambda: random_planes(signed16), VERIFY),
        "bf16 draft a8": (lambda: random_planes(signed16), draft),
        "int8 verify": (lambda: random_planes(signed8), VERIFY),
        "int8 draft a8": (lambda: random_planes(signed8), draft),
        "int4 verify": (lambda: random_planes(affine4), VERIFY),
        "int4 draft a8": (lambda: random_planes(affine4), draft),
    }
    x = torch.randn(num_rows, k).bfloat16()
    at = Rows(*[torch.zeros(1, dtype=torch.int64)] * 5, False)
    jobs: dict[str, tuple[list[cpu.layout.PackedMatrix], View, int]] = {}
    for name, (make, view) in forms.items():
        if only and name not in only:
            continue
        stored = make()
        nbytes = stored.draft_nbytes if view.is_draft else stored.nbytes
        first = cpu.pack(stored)
        jobs[name] = ([first] + [clone(first) for _ in range(ROTATE_BYTES // nbytes)], view, nbytes)
    memory = torch.ones(ROTATE_BYTES, dtype=torch.uint8)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    rates: list[float] = []
    for turn in range(rounds):
        start = time.perf_counter()
        _cpu.read_memory(memory.data_ptr(), memory.nbytes)
        rates.append(memory.nbytes / (time.perf_counter() - start) / 1e9)
        for name, (copies, view, nbytes) in jobs.items():
            count = max(1, (64 << 20) // nbytes)
            picked = [copies[(turn * count + i) % len(copies)] for i in range(count)]
            start = time.perf_counter()
            for packed in picked:
                cpu.linear(x, packed, None, view, at)
            times[name].append((time.perf_counter() - start) / count)
    rate = statistics.median(rates)
    print(f"{n}x{k}, {num_rows} rows; read {rate:.1f} GB/s (best {max(rates):.1f})")
    for name, (_, _, nbytes) in jobs.items():
        median, best = statistics.median(times[name]), min(times[name])
        gbs = nbytes / median / 1e9
        share = statistics.median(
            nbytes / t / 1e9 / r for t, r in zip(times[name], rates, strict=True)
        )
        print(
            f"  {name:14} {median * 1e6:8.0f} us (best {best * 1e6:7.0f})  {gbs:5.1f} GB/s  "
            f"{share:4.0%} of read"
        )


if __name__ == "__main__":
    main()
