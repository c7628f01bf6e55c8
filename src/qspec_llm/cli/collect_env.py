"""`qspec collect-env`: what a bug report should say about the machine."""

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from qspec_llm.kernels import available_backends
from qspec_llm.version import __version__

__all__ = ["run"]

PACKAGES = ("torch", "numpy", "safetensors", "transformers", "tokenizers", "gguf", "rich")
CPU_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    report = _report()
    if args.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        if isinstance(value, dict):
            text = ", ".join(f"{key} {version}" for key, version in value.items())
        print(f"{name + ':':<10} {text}")


def _report() -> dict[str, Any]:
    import torch

    cpu = _cpu()
    return {
        "qspec": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "flags": [flag for flag in CPU_FLAGS if flag in cpu.get("flags", "").split()],
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "backends": list(available_backends()),
        **_kernels(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _kernels() -> dict[str, Any]:
    """What the CPU kernels run with."""
    if "cpu" not in available_backends():
        return {"isa": "none: the CPU kernels were not built", "threads": 0}
    from qspec_llm.kernels import cpu

    return {"isa": cpu.isa(), "isas": cpu.available_isas(), "threads": cpu.num_threads()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _cpu() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo, empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    entry = path.read_text().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in entry.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
