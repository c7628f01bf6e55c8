"""A tiny model on disk, loaded once for each target."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from helpers_model_dir import write_model
from qspec_llm.llm import LLM


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "model"
    path.mkdir()
    write_model(path)
    return path


@pytest.fixture(scope="session")
def load(model_dir: Path) -> Callable[..., LLM]:
    """LLM(model_dir, target, draft), the same object for the same options."""

    @cache
    def make(target: str, draft: str = "a8") -> LLM:
        return LLM(model_dir, target=target, draft=draft, gamma=3, max_tokens_in_kv=4096)

    return make
