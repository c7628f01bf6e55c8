"""A tiny model directory for all tests here."""

from pathlib import Path

import pytest

from helpers_model_dir import write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random two-layer Llama over bytes."""
    path = tmp_path_factory.mktemp("model")
    write_model(path)
    return path
