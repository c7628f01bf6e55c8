"""Compiling kernels where NVRTC is installed, and the orders of emulated ones."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from helpers_cpu import Compile

from qspec_llm.kernels.cuda import compile as nvrtc


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compile:
    """Compile into an empty cache, `tmp_path`; a test that asks for it is skipped without NVRTC."""
    pytest.importorskip("cuda.bindings.nvrtc", exc_type=Exception)
    monkeypatch.setattr(nvrtc, "CACHE", tmp_path)

    def compile_(source: str, arch: str, macros: Mapping[str, int]) -> bytes:
        defines = [(name, str(value)) for name, value in macros.items()]
        try:
            return nvrtc.compile_source(source, arch, defines)
        except ValueError as error:
            if "needs the library NVRTC" in str(error):
                pytest.skip(str(error))
            raise

    return compile_


@pytest.fixture(params=[1, 2])
def seed(request: pytest.FixtureRequest) -> int:
    """Of the order in which the warps of an emulated kernel go on and copies arrive."""
    return int(request.param)
