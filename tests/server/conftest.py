"""One tiny model and one server for all tests of the server."""

import pytest

pytest.importorskip("fastapi", reason="the server's packages are an extra")
openai = pytest.importorskip("openai", reason="the official client is a development package")

from helpers_model_dir import write_model
from helpers_server import running
from qspec_llm.llm import LLM


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    write_model(path, context=1024)
    return path


@pytest.fixture(scope="session")
def make_llm(model_dir, tmp_path_factory):
    """Loads the tiny model with other options; step costs are kept for all of them."""
    cache = tmp_path_factory.mktemp("costs")

    def make(**options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QSPEC_CACHE", str(cache))
            return LLM(model_dir, **{"target": "int8", "gamma": "auto", **options})

    return make


@pytest.fixture(scope="session")
def server(make_llm):
    with running(make_llm(max_batch=8, max_tokens_in_kv=4096)) as running_server:
        yield running_server


@pytest.fixture(scope="session")
def offline(make_llm):
    """The same model without a server, decoding plainly."""
    return make_llm(gamma=0)


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one
