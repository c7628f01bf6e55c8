"""Evaluation harnesses: likelihoods of given texts, asked for as lm-evaluation-harness does."""

import importlib.util
import random
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest

from qspec_llm import SamplingParams


@pytest.fixture(scope="module")
def pairs():
    """Contexts and continuations, some that share their beginning, one longer than a chunk."""
    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(3, 9))) for _ in range(40)]
    shared = " ".join(words[:9])
    contexts = [shared, shared, " ".join(words), "Q", words[3], shared + " " + words[20]]
    return [(context, f" {rng.choice(words)}{index}") for index, context in enumerate(contexts)]


def offline_likelihood(llm, context, whole):
    """Log-likelihood of what follows `context` tokens in `whole`, and whether greedy gives it."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1, prompt_logprobs=1)
    engine = llm.new_engine(0)
    ((request,),) = llm.submit(engine, [whole], params)
    while engine.has_work:
        engine.step()
    entries = request.prompt_logprobs[len(context) - 1 :]
    assert [entry.token_id for entry in entries] == whole[len(context) :]
    return sum(e.logprob for e in entries), all(e.top[0][1] == e.logprob for e in entries)


def read(choice, num_context):
    """What the harness makes of a choice (`LocalCompletionsAPI.parse_logprobs`)."""
    values = choice["logprobs"]["token_logprobs"][num_context:-1]
    tops = choice["logprobs"]["top_logprobs"][num_context:-1]
    is_greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
    return sum(values), is_greedy


@pytest.mark.parametrize("is_auto", [False, True])
def test_likelihoods_under_load_equal_the_offline_ones(server, offline, pairs, is_auto):
    texts = [(offline.encode(context), offline.encode(context + rest)) for context, rest in pairs]
    wanted = [offline_likelihood(offline, *pair) for pair in texts]
    body = {"model": "tiny", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    body |= {"echo": True} | ({"speculative": {"gamma": "auto"}} if is_auto else {})

    def ask(chosen):
        prompts = [texts[index][1] for index in chosen]
        response = httpx.post(
            f"{server.url}/v1/completions", json={**body, "prompt": prompts}, timeout=60
        )
        assert response.status_code == 200, response.text
        choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
        return [
            read(choice, len(texts[index][0]))
            for choice, index in zip(choices, chosen, strict=True)
        ]

    jobs = [[0, 1], [2], [3, 4, 5], [5, 0], [1, 2, 3], [4]]
    with ThreadPoolExecutor(len(jobs)) as clients:
        for chosen, found in zip(jobs, clients.map(ask, jobs), strict=True):
            assert found == [wanted[index] for index in chosen]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
@pytest.mark.filterwarnings("ignore")  # it has its own
def test_the_harness_itself_gets_the_offline_likelihoods(server, offline, pairs, model_dir):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        model="tiny",
        base_url=f"{server.url}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(model_dir),
        batch_size=2,
        num_concurrent=3,
        max_retries=1,
    )
    instances = [
        Instance("loglikelihood", {}, pair, index, metadata=("t", index, 1))
        for index, pair in enumerate(pairs)
    ]
    wanted = [
        offline_likelihood(offline, offline.encode(context), offline.encode(context + rest))
        for context, rest in pairs
    ]
    found = model.loglikelihood(instances)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in wanted]
    assert [value for value, _ in found] == pytest.approx([v for v, _ in wanted], abs=1e-9)
    asked = [
        Instance("generate_until", {}, (context, {"until": [], "max_gen_toks": 9}), index)
        for index, (context, _) in enumerate(pairs)
    ]
    params = SamplingParams(temperature=0, max_tokens=9)
    texts = [offline.generate(context, params)[0].outputs[0].text for context, _ in pairs]
    assert model.generate_until(asked) == texts
