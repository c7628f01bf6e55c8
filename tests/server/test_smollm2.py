"""The official client and the real model: what a first user does."""

import json

import openai
import pytest

from helpers_server import running
from qspec_llm import SamplingParams
from qspec_llm.llm import LLM

pytestmark = pytest.mark.weights
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QSPEC_CACHE", str(tmp_path_factory.mktemp("costs")))
        yield LLM("smollm2", target="bf16", max_tokens_in_kv=4096, max_batch=4)


@pytest.fixture(scope="module")
def client(llm):
    with (
        running(llm, names=["smollm2"]) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one,
    ):
        yield one
        server.wait_until_idle()


def test_chat_streamed_or_not_is_the_offline_answer(client, llm):
    options = {"model": "smollm2", "messages": MESSAGES, "temperature": 0, "max_tokens": 40}
    texts = {
        client.chat.completions.create(**options, extra_body={"speculative": {"gamma": gamma}})
        .choices[0]
        .message.content
        for gamma in (0, 3)
    }
    chunks = client.chat.completions.create(**options, stream=True)
    texts.add("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    offline = llm.new_engine(0)
    prompt = llm.tokenizer.encode_chat(MESSAGES)
    (requests,) = llm.submit(offline, [prompt], SamplingParams(temperature=0, max_tokens=40))
    while offline.has_work:
        offline.step()
    assert texts == {requests[0].text.text}
    assert "Paris" in texts.pop()


def test_a_schema_is_followed(client):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    texts = set()
    for gamma in (0, 4):
        answer = client.chat.completions.create(
            model="smollm2",
            messages=MESSAGES,
            temperature=0,
            max_tokens=120,
            response_format=form,
            extra_body={"speculative": {"gamma": gamma}},
        )
        assert answer.choices[0].finish_reason == "stop"
        texts.add(answer.choices[0].message.content)
    assert len(texts) == 1
    assert json.loads(texts.pop()).keys() == {"city", "people"}


def test_echoed_logprobs_favour_the_right_word(client):
    scores = {}
    for word in ("Paris", "Banana"):
        answer = client.completions.create(
            model="smollm2",
            prompt=f"The capital of France is {word}",
            echo=True,
            max_tokens=0,
            logprobs=0,
        )
        scores[word] = sum(answer.choices[0].logprobs.token_logprobs[1:])
        assert "".join(answer.choices[0].logprobs.tokens) == f"The capital of France is {word}"
    assert scores["Paris"] > scores["Banana"]
