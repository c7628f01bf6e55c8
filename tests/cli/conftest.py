"""A tiny model directory with a tokenizer, as a user would have one."""

import pytest

from helpers_model_dir import write_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """Directory of a random two-layer Llama over bytes."""
    path = tmp_path_factory.mktemp("model")
    write_model(path)
    return path
