"""What a caller may ask of a request, one option at a time, the same for every gamma."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers_engine import (
    TINY,
    ByteTokenizer,
    RandomCheckpoint,
    RecordingRunner,
    drain,
    fake_engine,
    greedy,
    noisy_rule,
    run_model,
    tiny_decoder,
)
from helpers_weights import refused
from qspec_llm.engine.engine import MAX_GAMMA
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.sampling import probabilities
from qspec_llm.llm import LLM
from qspec_llm.weights.quantize import Target

GAMMAS = [0, 1, 3, 6]
VOCABULARY = 40
# pieces of one to three characters, so that stop strings cross tokens
PIECES = [
    *"abcdefghij",
    *(a + b for a in "abcde" for b in "abcde"),
    "abc",
    "cab",
    "bca",
    "dad",
    "!",
]
PIECES += ["?"] * (VOCABULARY - len(PIECES))


def complete(params: SamplingParams, gamma: int, *, prompt=(1, 2, 3), eos=(), seed: int = 0):
    """One completion by the fake model: its request, and all that was emitted."""
    rule = noisy_rule(VOCABULARY, seed=seed, noise=0.7)
    engine, _ = fake_engine(rule, VOCABULARY, gamma=gamma, eos_token_ids=eos, pieces=PIECES)
    request = engine.add(prompt, params, seed=1)
    return request, drain(engine)


# Length and ends


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("max_tokens", [1, 2, 5, 30])
def test_max_tokens(max_tokens, gamma):
    request, emissions = complete(greedy(max_tokens), gamma)
    assert len(request.output) == max_tokens
    assert request.finish_reason == "length"
    assert [e.finish_reason for e in emissions] == [None] * (len(emissions) - 1) + ["length"]


def test_the_models_context_ends_a_request_too():
    rule = noisy_rule(VOCABULARY)
    engine, _ = fake_engine(rule, VOCABULARY, gamma=5, context_length=12, pieces=PIECES)
    request = engine.add([1, 2, 3], greedy(100))
    drain(engine)
    assert request.num_tokens == 12
    assert request.finish_reason == "length"


def plain_output(num_tokens: int = 30) -> list[int]:
    return complete(greedy(num_tokens), 0)[0].output


@pytest.mark.parametrize("gamma", GAMMAS)
def test_an_end_token_ends_it_and_is_kept(gamma):
    output = plain_output()
    end = output[12]
    until = output[: output.index(end) + 1]
    for params, eos in ((greedy(30), (end,)), (greedy(30, stop_token_ids=[end]), ())):
        request, _ = complete(params, gamma, eos=eos)
        assert request.output == until
        assert request.finish_reason == "stop"
        assert request.text.text == "".join(PIECES[token] for token in until[:-1])


@pytest.mark.parametrize("gamma", GAMMAS)
def test_ignore_eos_passes_the_models_ends_but_not_the_callers(gamma):
    output = plain_output()
    request, _ = complete(greedy(30, ignore_eos=True), gamma, eos=(output[12],))
    assert request.output == output
    params = greedy(30, ignore_eos=True, stop_token_ids=(output[12],))
    request, _ = complete(params, gamma, eos=(output[12],))
    assert request.output == output[: output.index(output[12]) + 1]


def test_min_tokens_allows_no_end_before():
    end = plain_output()[12]
    runs = [
        complete(greedy(30, min_tokens=25), gamma, eos=(end,), prompt=(1, 2, 3))[0]
        for gamma in GAMMAS
    ]
    assert end not in runs[0].output[:25]
    assert len(runs[0].output) >= 25
    assert all(run.output == runs[0].output for run in runs)


def test_min_tokens_holds_when_sampling_what_is_likely_to_end():
    def rule(is_draft: bool, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([9.0, 0.0, 0.0])

    for gamma in GAMMAS:
        engine, _ = fake_engine(rule, 3, gamma=gamma, eos_token_ids=(0,))
        params = SamplingParams(max_tokens=50, min_tokens=10, seed=1)
        request = engine.add([1], params)
        drain(engine)
        assert 0 not in request.output[:10]
        assert 10 < len(request.output) < 20
        assert request.finish_reason == "stop"


def test_min_tokens_allows_no_stop_string_before():
    text = complete(greedy(30), 0)[0].text.text
    stop = text[3]
    for gamma in GAMMAS:
        request, _ = complete(greedy(30, stop=stop, min_tokens=15), gamma)
        assert len(request.output) >= 15
        assert len(request.text.text) > 3


@pytest.mark.parametrize("token", [3, -1])
def test_a_stop_token_outside_the_vocabulary_is_refused_or_harmless(token):
    """With min_tokens, 3 is an IndexError in the middle of a step and -1 bans the last token."""
    engine, _ = fake_engine(lambda is_draft, tokens: torch.arange(3.0), 3)
    try:
        request = engine.add([1], greedy(4, min_tokens=2, stop_token_ids=(token,)))
    except ValueError:
        return
    drain(engine)
    assert request.output == [2, 2, 2, 2]


# Stop strings


@pytest.mark.parametrize("seed", range(6))
def test_a_stop_string_across_tokens_gives_one_answer_for_every_gamma(seed):
    whole = complete(greedy(30), 0, seed=seed)[0]
    text = whole.text.text
    crossing = [
        text[end - 2 : end + 2]
        for end in whole.text.ends[8:16]
        if len(text[end - 2 : end + 2]) == 4
    ]
    stop = crossing[0]
    runs = [complete(greedy(30, stop=[stop, "zzz"]), gamma, seed=seed) for gamma in GAMMAS]
    for request, emissions in runs:
        assert request.text.text == text[: text.index(stop)]
        assert "".join(emission.text for emission in emissions) == request.text.text
        assert request.finish_reason == "stop"
        assert request.output == whole.output[: len(request.output)]
        # the last token is the one that completed the string
        assert stop in "".join(PIECES[token] for token in request.output)
        assert stop not in "".join(PIECES[token] for token in request.output[:-1])
        assert [t for e in emissions for t in e.token_ids] == request.output
        assert request.output == runs[0][0].output


@pytest.mark.parametrize("gamma", GAMMAS)
def test_text_that_may_begin_a_stop_string_is_not_handed_out(gamma):
    pieces = ["x", "a", "b", "c"]
    script = [0, 1, 2, 0, 1, 2, 3, 0]

    def rule(is_draft: bool, tokens: Sequence[int]) -> Tensor:
        return torch.eye(4)[script[(len(tokens) - 1) % len(script)]] * 5

    engine, _ = fake_engine(rule, 4, gamma=gamma, pieces=pieces)
    request = engine.add([0], greedy(20, stop="abc"))
    seen = ""
    while engine.has_work:
        for emission in engine.step():
            seen += emission.text
            assert "xabxab".startswith(seen)
            so_far = "".join(pieces[token] for token in request.output)
            held = max((n for n in (1, 2) if so_far.endswith("abc"[:n])), default=0)
            if not request.is_finished:
                assert seen == so_far[: len(so_far) - held]
    assert seen == request.text.text == "xabx"
    assert request.output == script[:7]


@pytest.mark.parametrize("gamma", [0, 3])
def test_multi_byte_characters_stream_whole(gamma):
    data = "naïve 日本語 😀!".encode()

    def rule(is_draft: bool, tokens: Sequence[int]) -> Tensor:
        logits = torch.zeros(256)
        position = len(tokens) - 1
        logits[data[position] if position < len(data) else ord(".")] = 9.0
        return logits

    for num_tokens in (len(data), len(data) - 2):
        engine, _ = fake_engine(rule, 256, gamma=gamma)
        request = engine.add([0], greedy(num_tokens))
        emissions = drain(engine)
        deltas = [emission.text for emission in emissions]
        assert "".join(deltas) == request.text.text == data[:num_tokens].decode(errors="replace")
        assert not any("\ufffd" in delta for delta in deltas[:-1])


@pytest.mark.parametrize("gamma", GAMMAS)
def test_segments_say_which_text_the_draft_made(gamma):
    request, emissions = complete(greedy(30), gamma)
    origins = [
        segment.is_drafted
        for emission in emissions
        for segment in emission.segments
        for _ in segment.text
    ]
    expected = [
        drafted
        for token, drafted in zip(request.output, request.is_drafted, strict=True)
        for _ in PIECES[token]
    ]
    assert origins == expected
    assert sum(emission.num_drafted for emission in emissions) == sum(request.is_drafted)
    assert sum(request.is_drafted) == request.num_accepted
    assert (request.num_accepted > 0) == (gamma > 0)


# Logprobs


@pytest.mark.parametrize("gamma", [0, 3])
@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.7, "seed": 3, "top_k": 5}], ids=str
)
def test_logprobs_are_the_verifiers_own(gamma, options):
    """Before penalties, temperature and cuts, whatever those do to the choice."""
    params = SamplingParams(max_tokens=12, logprobs=4, repetition_penalty=1.5, **options)
    run = run_model(tiny_decoder(Target.INT8), [[4, 5, 6], [7]], params, gamma=gamma)
    for request, logits in zip(run.requests, run.logits, strict=True):
        assert len(request.logprobs) == len(request.output)
        table = torch.log_softmax(logits.double(), dim=-1)
        for token, row, entry in zip(request.output, table, request.logprobs, strict=True):
            assert entry.token_id == token
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-9)
            values = [value for _, value in entry.top]
            assert values == pytest.approx(sorted(row.tolist(), reverse=True)[:4], abs=1e-9)
            assert all(row[each] == value for each, value in entry.top)


def test_logprobs_zero_gives_the_chosen_token_alone():
    request, _ = complete(greedy(5, logprobs=0), 3)
    assert [len(entry.top) for entry in request.logprobs] == [0] * 5


def test_no_logprobs_unless_asked():
    assert complete(greedy(5), 3)[0].logprobs == []


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_stop_leaves_one_logprob_a_token(gamma):
    end = plain_output()[12]
    request, _ = complete(greedy(30, logprobs=1), gamma, eos=(end,))
    assert [entry.token_id for entry in request.logprobs] == request.output


def test_more_logprobs_than_the_vocabulary_has():
    engine, _ = fake_engine(lambda is_draft, tokens: torch.arange(3.0), 3)
    request = engine.add([1], greedy(4, logprobs=5))
    drain(engine)
    assert [len(entry.top) for entry in request.logprobs] == [3] * 4


# Penalties


def plain_penalised(
    rule, prompt: Sequence[int], params: SamplingParams, num_tokens: int
) -> list[int]:
    """Greedy decoding with penalties, read from the definition, one token at a time."""
    output: list[int] = []
    for _ in range(num_tokens):
        logits = rule(False, [*prompt, *output]).tolist()
        counts = Counter(output)
        for token in {*prompt, *output}:
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token, count in counts.items():
            logits[token] -= params.frequency_penalty * count + params.presence_penalty
        output.append(max(range(len(logits)), key=logits.__getitem__))
    return output


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 1.5},
        {"presence_penalty": -1.0},
        {"frequency_penalty": 0.9},
        {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    ],
    ids=str,
)
def test_penalties_equal_a_plain_reading_for_every_gamma(options):
    rule = noisy_rule(VOCABULARY, noise=0.7)
    params = greedy(40, **options)
    expected = plain_penalised(rule, [1, 2, 3], params, 40)
    assert expected != plain_penalised(rule, [1, 2, 3], greedy(40), 40)
    for gamma in GAMMAS:
        assert complete(params, gamma)[0].output == expected


# Parameters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("logprobs", -1),
        ("logprobs", 21),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("n", 0),
        ("n", 65),
        ("seed", 2**64),
    ],
)
def test_a_value_beyond_its_limit_is_refused_by_name(name, value):
    with refused(name, value):
        SamplingParams(**{name: value})


def test_min_tokens_above_max_tokens_is_refused():
    with refused("min_tokens", 9, 8):
        SamplingParams(min_tokens=9, max_tokens=8)


def test_an_empty_stop_string_is_refused():
    with refused("stop"):
        SamplingParams(stop=["a", ""])


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1)


def test_one_stop_string_may_be_given_bare():
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", None),
        ("temperature", None),
        ("n", None),
        ("max_tokens", 2.5),
        ("top_k", 1.5),
        ("max_tokens", "8"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(name, value):
    with refused(name, value):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("gamma", [-1, MAX_GAMMA + 1])
def test_gamma_beyond_its_limit_is_refused(gamma):
    engine, _ = fake_engine(noisy_rule(5), 5)
    with refused("gamma", gamma, MAX_GAMMA):
        engine.add([1], greedy(2), gamma=gamma)
    with refused("gamma", gamma, MAX_GAMMA):
        fake_engine(noisy_rule(5), 5, gamma=gamma)
    assert not engine.has_work


def test_the_greatest_gamma_works():
    request, _ = complete(greedy(30), MAX_GAMMA)
    assert request.output == plain_output()


# The offline API, over a model that fits in a test


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory):
    """A tiny random Llama as Hugging Face writes one, its vocabulary the 256 bytes."""
    path = tmp_path_factory.mktemp("tiny")
    checkpoint = RandomCheckpoint(replace(TINY, vocab_size=256), seed=3)
    save_file(
        {name: checkpoint.read(name, Target.BF16) for name in checkpoint.names()},
        path / "model.safetensors",
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 256,
        "hidden_size": TINY.hidden_size,
        "intermediate_size": TINY.intermediate_size,
        "num_hidden_layers": TINY.num_layers,
        "num_attention_heads": TINY.num_heads,
        "num_key_value_heads": TINY.num_kv_heads,
        "head_dim": TINY.head_dim,
        "rms_norm_eps": TINY.norm_eps,
        "rope_theta": TINY.rope_theta,
        "max_position_embeddings": TINY.context_length,
    }
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture
def make_llm(model_path, monkeypatch):
    monkeypatch.setattr("qspec_llm.llm.HFTokenizer", lambda path: ByteTokenizer())
    return lambda **options: LLM(model_path, **options)


def test_n_completions_come_in_order_and_differ(make_llm):
    llm = make_llm(gamma=2)
    (alone,) = llm.generate(["ab"], SamplingParams(max_tokens=10, n=3, seed=5))
    assert [output.index for output in alone.outputs] == [0, 1, 2]
    assert len({output.token_ids for output in alone.outputs}) == 3
    both = llm.generate(["xyz", "ab"], SamplingParams(max_tokens=10, n=3, seed=5))
    assert [output.token_ids for output in both[1].outputs] == [
        output.token_ids for output in alone.outputs
    ]
    assert [result.prompt for result in both] == ["xyz", "ab"]
    assert both[1].prompt_token_ids == tuple(b"ab")


def test_every_target_generates_and_gamma_may_be_given_each_time(make_llm):
    for target in Target:
        llm = make_llm(target=target.value, gamma=4)
        drafted, plain = (
            llm.generate("hello", greedy(20, logprobs=1), gamma=gamma)[0].outputs[0]
            for gamma in (None, 0)
        )
        assert drafted.token_ids == plain.token_ids
        assert drafted.logprobs == plain.logprobs
        assert drafted.text == plain.text
        assert drafted.speculation.drafted > plain.speculation.drafted == 0
        assert plain.speculation.cycles == 20


def test_speculation_figures_are_consistent(make_llm):
    (result,) = make_llm(gamma=3).generate("hello", greedy(25))
    figures = result.outputs[0].speculation
    assert figures.accepted <= figures.tested <= figures.drafted <= 3 * figures.cycles
    assert figures.cycles + figures.accepted == 25


@pytest.mark.parametrize("max_tokens_in_kv", [17, 40, 50])
def test_a_cache_that_is_no_multiple_of_a_block_can_be_filled(make_llm, max_tokens_in_kv):
    llm = make_llm(gamma=3, max_tokens_in_kv=max_tokens_in_kv)
    (result,) = llm.generate("hello", greedy(100))
    assert len(result.outputs[0].token_ids) >= max_tokens_in_kv - 5
    assert result.outputs[0].finish_reason == "length"


def test_streaming_says_what_generating_says_and_closing_it_aborts(make_llm):
    llm = make_llm(gamma=3)
    (result,) = llm.generate("hello", greedy(20))
    emissions = list(llm.stream(list(b"hello"), greedy(20)))
    assert "".join(emission.text for emission in emissions) == result.outputs[0].text
    stream = llm.stream(list(b"hello"), greedy(20))
    next(stream)
    stream.close()
    assert not llm.engine.has_work


@pytest.mark.parametrize("bad", ["", [], [256], [-1], [1] * 600])
def test_a_batch_with_a_bad_prompt_generates_nothing(make_llm, bad):
    llm = make_llm()
    with pytest.raises(ValueError, match=r"prompt"):
        llm.generate(["good", bad], greedy(5))
    assert not llm.engine.has_work
    assert len(llm.generate("good", greedy(5))[0].outputs[0].token_ids) == 5


def test_a_refused_batch_leaves_nothing_in_the_engine_it_was_for(make_llm):
    llm = make_llm(max_tokens_in_kv=64)
    other = llm.new_engine(0)
    kept = llm.engine.add([1, 2], greedy(5))
    with pytest.raises(ValueError, match="64"):
        llm.submit(other, [[1, 2], [1] * 100], greedy(5))
    assert not other.has_work
    assert not kept.is_finished


def test_logits_of_a_recorded_run_are_not_those_of_the_draft():
    """The recorder that other tests lean on keeps verify logits."""
    decoder = tiny_decoder(Target.BF16)
    runner = RecordingRunner(decoder, 4)
    assert runner.logits == {}
    run = run_model(decoder, [[1, 2, 3]], greedy(6), gamma=2)
    assert run.tokens[0] == run.logits[0].argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300, 5e-324])
def test_no_temperature_is_too_small_to_draw_at(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    probs = probabilities(logits, SamplingParams(temperature=temperature))
    assert probs.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("top_p", [1e-9, 1e-50, 5e-324])
def test_no_top_p_is_too_small_to_keep_the_most_likely(top_p):
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    probs = probabilities(logits, SamplingParams(temperature=1, top_p=top_p))
    assert probs.tolist() == [[0.0, 1.0, 0.0]]
