"""Bodies made up from the OpenAPI schema, right and wrong ones: none brings out a 500."""

import httpx2 as httpx
import pytest
from hypothesis import HealthCheck, given, settings

from helpers_server import running

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

NUM_EXAMPLES, NUM_SOAK_EXAMPLES = 25, 400
QUIET = list(HealthCheck)


@pytest.fixture(scope="module")
def small_server(make_llm):
    """Little room, so that answers are short."""
    with running(make_llm(max_batch=4, max_tokens_in_kv=96)) as server:
        yield server


@pytest.fixture(scope="module")
def api(small_server):
    return schemathesis.openapi.from_url(f"{small_server.url}/openapi.json")


OPERATIONS = {
    "/health": "GET",
    "/version": "GET",
    "/v1/models": "GET",
    "/v1/models/{name}": "GET",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
}
MODES = list(schemathesis.GenerationMode)


def fuzz(server, operation, mode, **options):
    """Call one operation with cases that its schema allows, or with such that it forbids."""

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(deadline=None, suppress_health_check=QUIET, database=None, **options)
    def check(case):
        response = case.call(timeout=60)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert response.json()["error"]["message"]
        assert server.worker.is_healthy

    check()


@pytest.mark.parametrize("path", [path for path, method in OPERATIONS.items() if method == "GET"])
def test_no_path_brings_out_a_500(api, small_server, path):
    mode = schemathesis.GenerationMode.POSITIVE  # nothing can be wrong about them
    fuzz(small_server, api[path]["GET"], mode, max_examples=5, derandomize=True)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("path", [path for path, method in OPERATIONS.items() if method == "POST"])
def test_no_body_brings_out_a_500(api, small_server, path, mode):
    fuzz(small_server, api[path]["POST"], mode, max_examples=NUM_EXAMPLES, derandomize=True)


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("path", [path for path, method in OPERATIONS.items() if method == "POST"])
def test_no_body_brings_out_a_500_for_longer(api, small_server, path, mode):
    fuzz(small_server, api[path]["POST"], mode, max_examples=NUM_SOAK_EXAMPLES)


def test_the_schema_describes_every_endpoint(small_server):
    paths = httpx.get(f"{small_server.url}/openapi.json").json()["paths"]
    assert paths.keys() == OPERATIONS.keys()


def test_afterwards_nothing_is_left(small_server):
    small_server.wait_until_idle()
