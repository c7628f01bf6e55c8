"""The official client against a running server: both endpoints, every option, every error."""

import json

import httpx2 as httpx
import openai
import pytest

from qspec_llm import SamplingParams

PROMPT = "The quick brown fox"
MESSAGES = [{"role": "user", "content": "Tell me a story."}]


def plain(offline, prompt, **options):
    params = SamplingParams(**{"temperature": 0, "max_tokens": 24, **options})
    (result,) = offline.generate([prompt], params)
    return result.outputs[0]


def complete(client, prompt=PROMPT, **options):
    return client.completions.create(
        **{"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 24, **options}
    )


def chat(client, messages=MESSAGES, **options):
    return client.chat.completions.create(
        **{"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 24, **options}
    )


def chat_prompt(offline, messages=MESSAGES):
    return offline.tokenizer.encode_chat(messages)


# Plain answers


@pytest.mark.parametrize("speculative", [None, False, True, {"gamma": 3}, {"gamma": "auto"}])
def test_a_completion_is_the_offline_answer(client, offline, speculative):
    answer = complete(client, extra_body={"speculative": speculative})
    expected = plain(offline, PROMPT)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == len(PROMPT) + len(expected.token_ids)
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert answer.id.startswith("cmpl-")


def test_a_chat_answer_is_the_offline_answer(client, offline):
    answer = chat(client)
    expected = plain(offline, chat_prompt(offline))
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", expected.text)
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.object == "chat.completion"


def test_content_may_come_in_parts_and_developers_are_the_system(client, offline):
    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "a story."}]
    assert chat(client, [{"role": "user", "content": parts}]).choices[0].message.content == (
        chat(client).choices[0].message.content
    )
    texts = {
        chat(client, [{"role": role, "content": "Be brief."}, *MESSAGES]).choices[0].message.content
        for role in ("system", "developer")
    }
    assert len(texts) == 1


def test_prompts_may_be_many_texts_or_tokens(client, offline):
    texts = ["one", "two and a half", "three"]
    answer = complete(client, texts)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert [c.text for c in answer.choices] == [plain(offline, text).text for text in texts]
    ids = [list(text.encode()) for text in texts]
    tokens = [offline.encode(text) for text in texts]
    assert [c.text for c in complete(client, tokens).choices] == [c.text for c in answer.choices]
    assert complete(client, tokens[0]).choices[0].text == answer.choices[0].text
    assert len(ids) == 3


# Streaming


@pytest.mark.parametrize("gamma", [0, 4])
def test_streamed_completions_are_the_same(client, gamma):
    extra = {"speculative": {"gamma": gamma}}
    whole = complete(client, extra_body=extra)
    chunks = list(complete(client, stream=True, extra_body=extra))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({c.id for c in chunks}) == 1


def test_a_streamed_chat_begins_with_the_role(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].object == "chat.completion.chunk"
    texts = [c.choices[0].delta.content or "" for c in chunks]
    assert "".join(texts) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(c.usage is None for c in chunks)


@pytest.mark.parametrize("create", [complete, chat])
def test_usage_comes_last_when_asked_for(client, create):
    whole = create(client, n=2)
    *chunks, last = create(client, n=2, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert all(chunk.usage is None for chunk in chunks)


def test_the_wire_ends_with_done(server):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 3, "stream": True}
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_origins_say_who_made_each_piece(server):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 60, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_origins": True}, "speculative": {"gamma": 3}}
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if "{" in line]
    for chunk in chunks:
        pieces = chunk["speculative"]["segments"]
        assert "".join(piece["text"] for piece in pieces) == chunk["choices"][0]["text"]
    assert {piece["is_drafted"] for c in chunks for piece in c["speculative"]["segments"]} == {
        True,
        False,
    }
    assert any(chunk["speculative"]["num_accepted"] for chunk in chunks)


def test_characters_are_never_cut(client, offline):
    """Random bytes: most of what this model says is no UTF-8."""
    for seed in range(5):
        options = {"seed": seed, "temperature": 1.5, "max_tokens": 80}
        whole = complete(client, **options).choices[0].text
        chunks = [c.choices[0].text for c in complete(client, stream=True, **options)]
        assert "".join(chunks) == whole


# Options


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("create", [complete, chat])
def test_stop_strings_are_cut_off_even_across_tokens(client, create, is_stream):
    def text_of(answer):
        choice = answer.choices[0]
        return choice.text if hasattr(choice, "text") else choice.message.content

    whole = text_of(create(client))
    stop = whole[5:9]
    expected = whole[: whole.index(stop)]
    if is_stream:
        chunks = list(create(client, stop=["zzzzzz", stop], stream=True))
        text = "".join(
            c.choices[0].text if hasattr(c.choices[0], "text") else c.choices[0].delta.content or ""
            for c in chunks
        )
        reason = chunks[-1].choices[0].finish_reason
    else:
        answer = create(client, stop=stop)
        text, reason = text_of(answer), answer.choices[0].finish_reason
    assert (text, reason) == (expected, "stop")


def test_n_completions_differ_and_a_seed_repeats_them(client):
    options = {"n": 4, "temperature": 1.0, "seed": 7}
    first, second = ([c.text for c in complete(client, **options).choices] for _ in range(2))
    assert first == second
    assert len(set(first)) == 4
    assert [c.message.content for c in chat(client, n=2).choices] == (
        [chat(client).choices[0].message.content] * 2
    )


def test_logit_bias_decides(client):
    answer = complete(client, logit_bias={"65": 100}, max_tokens=5)
    token = complete(client, [[65]], echo=True, max_tokens=0).choices[0].text
    assert answer.choices[0].text == token * 5


def test_penalties_change_the_answer_and_gammas_do_not(client, offline):
    options = {"presence_penalty": 1.5, "frequency_penalty": 1.0}
    texts = {
        complete(client, extra_body={"speculative": {"gamma": g}}, **options).choices[0].text
        for g in (0, 1, 4)
    }
    assert texts == {plain(offline, PROMPT, **options).text}
    assert texts != {complete(client).choices[0].text}


def test_other_sampling_options_are_the_offline_ones(client, offline):
    options = {"temperature": 0.9, "top_p": 0.8, "seed": 3}
    extra = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 5}
    text = complete(client, extra_body={**extra, "speculative": False}, **options).choices[0].text
    assert text == plain(offline, PROMPT, **options, **extra).text


def test_stop_token_ids_and_ignore_eos(client, offline):
    tokens = plain(offline, PROMPT).token_ids
    answer = complete(client, extra_body={"stop_token_ids": [tokens[3]]})
    assert answer.usage.completion_tokens == tokens.index(tokens[3]) + 1
    assert answer.choices[0].finish_reason == "stop"
    assert complete(client, extra_body={"ignore_eos": True}, max_tokens=40).usage.completion_tokens


def test_max_completion_tokens_is_the_new_name(client):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_completion_tokens=4
    )
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (4, "length")


def test_without_max_tokens_a_completion_has_16_and_a_chat_what_fits(client, server):
    answer = client.completions.create(
        model="tiny", prompt="a", temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 16
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == 1024


# Log-probabilities


def test_chat_logprobs_are_the_verifiers(client, offline):
    answer = chat(client, logprobs=True, top_logprobs=3, extra_body={"speculative": {"gamma": 3}})
    expected = plain(offline, chat_prompt(offline), logprobs=3)
    content = answer.choices[0].logprobs.content
    assert [e.logprob for e in content] == pytest.approx([e.logprob for e in expected.logprobs])
    for entry, each in zip(content, expected.logprobs, strict=True):
        assert bytes(entry.bytes) == offline.tokenizer.token_bytes(each.token_id)
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx([v for _, v in each.top])
    streamed = chat(client, logprobs=True, top_logprobs=3, stream=True)
    chunks = [c.choices[0].logprobs for c in streamed]
    assert [e for chunk in chunks if chunk for e in chunk.content] == content


def test_completion_logprobs(client, offline):
    answer = complete(client, logprobs=2)
    expected = plain(offline, PROMPT, logprobs=2)
    table = answer.choices[0].logprobs
    assert table.token_logprobs == pytest.approx([e.logprob for e in expected.logprobs])
    assert all(2 <= len(top) <= 3 for top in table.top_logprobs)
    assert table.text_offset[0] == 0
    assert len(table.tokens) == len(expected.token_ids)
    streamed = [c.choices[0].logprobs for c in complete(client, logprobs=2, stream=True)]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        joined = [entry for part in streamed for entry in getattr(part, name)]
        assert joined == getattr(table, name)


@pytest.mark.parametrize("is_stream", [False, True])
def test_echo_with_prompt_logprobs_for_evaluation_harnesses(client, offline, is_stream):
    answer = complete(client, echo=True, max_tokens=0, logprobs=1, stream=is_stream)
    if is_stream:
        (answer,) = answer
    choice = answer.choices[0]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    (request,) = offline.submit(offline.engine, [offline.encode(PROMPT)], params)[0]
    while offline.engine.has_work:
        offline.engine.step()
    assert choice.text == PROMPT
    assert choice.logprobs.tokens == list(PROMPT)
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(
        [entry.logprob for entry in request.prompt_logprobs]
    )
    assert choice.logprobs.text_offset == list(range(len(PROMPT)))
    assert choice.finish_reason == "length"
    if not is_stream:
        assert answer.usage.completion_tokens == 0


def test_echo_comes_before_the_answer(client, offline):
    answer = complete(client, echo=True, logprobs=0, max_tokens=3)
    expected = plain(offline, PROMPT, max_tokens=3)
    assert answer.choices[0].text == PROMPT + expected.text
    assert len(answer.choices[0].logprobs.tokens) == len(PROMPT) + 3
    streamed = complete(client, echo=True, max_tokens=3, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == PROMPT + expected.text


# Structured output

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def json_format(schema=None):
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema or SCHEMA}}


@pytest.mark.parametrize("temperature", [0, 1.2])
@pytest.mark.parametrize("gamma", [0, 2, 6])
def test_a_json_schema_is_followed_whatever_gamma(client, gamma, temperature):
    for seed in range(3):
        answer = chat(
            client,
            response_format=json_format(),
            temperature=temperature,
            max_tokens=400,
            seed=seed,
            extra_body={"speculative": {"gamma": gamma}},
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content)
        assert value.keys() == SCHEMA["properties"].keys()
        assert 0 <= value["age"] <= 120
        assert len(value["name"]) <= 8
        assert set(value["tags"]) <= {"a", "b"}


def test_structured_answers_do_not_depend_on_gamma(client):
    texts = {
        chat(
            client,
            response_format=json_format(),
            max_tokens=400,
            extra_body={"speculative": {"gamma": gamma}},
        )
        .choices[0]
        .message.content
        for gamma in (0, 1, 3, 8)
    }
    assert len(texts) == 1


def test_json_object(client):
    answer = chat(
        client, response_format={"type": "json_object"}, max_tokens=300, logit_bias={"92": 1}
    )
    text = answer.choices[0].message.content
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "forecast")
]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_required_tool_is_called(client, choice, is_stream):
    options = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 300}
    options |= {"parallel_tool_calls": False, "stream": is_stream}
    answer = chat(client, **options)
    if is_stream:
        chunks = list(answer)
        calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
        reason = chunks[-1].choices[0].finish_reason
        assert calls[0].index == 0
    else:
        calls, reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
        assert answer.choices[0].message.content is None
    (call,) = calls
    assert reason == "tool_calls"
    assert call.function.name in ("weather", "forecast") if choice == "required" else "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    assert call.id.startswith("call_")


def test_tools_may_be_left_alone_and_results_sent_back(client):
    answer = chat(client, tools=TOOLS)
    assert answer.choices[0].message.content is not None
    assert chat(client, tools=TOOLS, tool_choice="none").choices[0].message.content
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"city": "Rome"}'}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert chat(client, messages, tools=TOOLS).choices[0].message.content is not None


# What is told about the answer


def test_cached_prompts_are_counted(client):
    prompt = "a prompt that is longer than some blocks of the cache are"
    complete(client, prompt)
    usage = complete(client, prompt).usage
    assert usage.prompt_tokens_details.cached_tokens == (len(prompt) - 1) // 16 * 16
    salted = complete(client, prompt, extra_body={"cache_salt": "mine"}).usage
    assert salted.prompt_tokens_details.cached_tokens == 0


def test_speculation_is_reported(client):
    answer = complete(client, max_tokens=60, extra_body={"speculative": {"gamma": 2}})
    figures = answer.model_extra["metrics"]["speculative_decoding"]
    assert 1 <= figures["mean_acceptance_length"] <= 3
    assert 0 <= figures["draft_acceptance_rate"] <= 1
    accepted = sum(index * n for index, n in enumerate(figures["acceptance_histogram"]))
    details = answer.usage.completion_tokens_details
    assert details.accepted_prediction_tokens == accepted
    off = complete(client, extra_body={"speculative": False}).model_extra["metrics"]
    assert off["speculative_decoding"]["draft_acceptance_rate"] is None


# Models, tokens, state


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert model.model_extra["max_model_len"] == 1024
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nonsense")


def test_tokenize_and_back(server, offline):
    found = httpx.post(f"{server.url}/tokenize", json={"prompt": "héllo"}).json()
    assert found["tokens"] == offline.encode("héllo")
    assert found["count"] == 6
    body = {"tokens": found["tokens"]}
    assert httpx.post(f"{server.url}/detokenize", json=body).json() == {"prompt": "héllo"}
    found = httpx.post(f"{server.url}/tokenize", json={"messages": MESSAGES}).json()
    assert found["tokens"] == chat_prompt(offline)


def test_health_version_and_page(server):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert "version" in httpx.get(f"{server.url}/version").json()
    page = httpx.get(server.url)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_metrics_count(server, client):
    def read():
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    before = read()
    answer = complete(client, max_tokens=50, extra_body={"speculative": {"gamma": 2}})
    after = read()

    def grown(name):
        return after[f"qspec:{name}"] - before[f"qspec:{name}"]

    accepted = answer.usage.completion_tokens_details.accepted_prediction_tokens
    assert grown("generation_tokens_total") == answer.usage.completion_tokens
    assert grown("prompt_tokens_total") == len(PROMPT)
    assert grown("spec_decode_num_accepted_tokens_total") == accepted
    assert grown("spec_decode_num_draft_tokens_total") >= grown("spec_decode_num_drafts_total") > 0
    per_position = [
        grown(f'spec_decode_num_accepted_tokens_per_pos_total{{position="{i}"}}') for i in range(16)
    ]
    assert sum(per_position) == accepted
    assert per_position[0] >= per_position[1]
    assert grown("time_to_first_token_seconds_count") == 1
    assert grown("e2e_request_latency_seconds_count") == 1
    assert grown('step_seconds_total{part="verify"}') > 0
    assert after["qspec:num_requests_running"] == 0
    assert after["qspec:kv_cache_usage_perc"] == 0


# Errors

WRONG = {
    "temperature": [-1, 3, "hot"],
    "top_p": [0, 2],
    "max_tokens": [-1, 10**9, 1.5],
    "n": [0, 65],
    "stop": [[f"s{i}" for i in range(1_000)], [""], "x" * 1000, 5],
    "presence_penalty": [3],
    "logit_bias": [{"99999": 1}, {"a": 1}, {"1": 200}],
    "nonsense": [1],
    "speculative": [{"gamma": 17}, {"gamma": -1}, {"n": 1}, "yes"],
    "stream_options": [{"include_usage": True}],
    "model": [5],
    "stop_token_ids": [[-1], [5000]],
}


@pytest.mark.parametrize(
    ("option", "value"), [(k, v) for k, vs in WRONG.items() for v in vs], ids=str
)
@pytest.mark.parametrize("create", [complete, chat])
def test_wrong_options_are_refused_in_openais_shape(client, create, option, value):
    options = {option: value} if option == "max_tokens" else {"extra_body": {option: value}}
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, **options)
    error = caught.value.body
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_an_error_names_its_option(client):
    for option, value in (("temperature", -1), ("nonsense", 1), ("logit_bias", {"1": 500})):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, extra_body={option: value})
        assert caught.value.body["param"] == option


def test_what_is_too_long_says_so(client):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, "a" * 1100)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, "a" * 1000, max_tokens=100)
    assert "1024" in caught.value.body["message"]


def test_empty_prompts_and_messages_are_refused(client):
    for prompt in ("", [], [""], [[]], [[1], []], [[-1]], [[99999]]):
        with pytest.raises(openai.BadRequestError):
            complete(client, prompt)
    with pytest.raises(openai.BadRequestError):
        chat(client, [])


def test_wrong_tools_and_formats_are_refused(client):
    wrong = [
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "none"}}},
        {"response_format": {"type": "xml"}},
        {"response_format": json_format({"type": "nonsense"})},
        {"response_format": json_format({"$ref": "http://example.com/x"})},
        {"tools": TOOLS, "response_format": json_format()},
        {"tools": [{"type": "function", "function": {"name": "bad name"}}]},
        {"top_logprobs": 3},
    ]
    for options in wrong:
        with pytest.raises(openai.BadRequestError):
            chat(client, **options)


def test_an_unknown_model_is_a_404(client):
    for create in (complete, chat):
        with pytest.raises(openai.NotFoundError) as caught:
            create(client, model="gpt-4")
        assert caught.value.code == "model_not_found"


def test_unknown_paths_and_methods_have_openais_shape(server):
    for response, status in (
        (httpx.get(f"{server.url}/v1/nonsense"), 404),
        (httpx.get(f"{server.url}/v1/completions"), 405),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_after_all_that_nothing_is_left(server):
    server.wait_until_idle()
