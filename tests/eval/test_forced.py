"""Teacher forcing gives, bit for bit, what the engine's own views compute."""

from dataclasses import replace

import pytest
import torch

from helpers_engine import (
    DRAFT,
    ByteTokenizer,
    greedy,
    ragged_prompts,
    run_model,
    same_bits,
    tiny_decoder,
)
from qspec_llm.engine.batch import Batch, Span
from qspec_llm.eval.forced import OneView, Script, Step, read_along, runner_for
from qspec_llm.model.decoder import Decoder
from qspec_llm.weights.quantize import Target
from qspec_llm.weights.view import VERIFY

PROMPTS = ragged_prompts(4, 97)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder(Target.INT4)


@pytest.fixture(scope="module")
def scripts(decoder: Decoder) -> list[Script]:
    run = run_model(decoder, PROMPTS, greedy(9))
    return [Script(tuple(p), tuple(t)) for p, t in zip(PROMPTS, run.tokens, strict=True)]


def steps(decoder: Decoder, scripts: list[Script], max_batch: int) -> list[Step]:
    runners = {"verify": runner_for(decoder, scripts, max_batch)}
    drafts = {"a8": DRAFT}
    return list(read_along(runners, scripts, ByteTokenizer(), drafts=drafts, max_batch=max_batch))


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_verify_logits_are_those_of_plain_decoding(
    decoder: Decoder, scripts: list[Script], max_batch: int
) -> None:
    run = run_model(decoder, PROMPTS, greedy(9))
    rows: dict[int, list[torch.Tensor]] = {}
    for step in steps(decoder, scripts, max_batch):
        assert step.next_tokens.tolist() == step.logits["verify"].argmax(-1).tolist()
        for index, row in zip(step.scripts, step.logits["verify"], strict=True):
            rows.setdefault(index, []).append(row)
    for index, logits in enumerate(run.logits):
        assert same_bits(torch.stack(rows[index]), logits)


def test_draft_logits_are_those_of_a_first_draft(decoder: Decoder, scripts: list[Script]) -> None:
    """One row in the draft view over KV that only the verify view has written."""
    script = scripts[1]
    found = [
        step.logits["a8"][step.scripts.index(1)]
        for step in steps(decoder, scripts, 8)
        if 1 in step.scripts
    ]
    tokens = (*script.prompt, *script.continuation)
    for offset in (0, 1, 5):
        runner = runner_for(decoder, scripts, 8)
        request = _request(decoder, script)
        at = len(script.prompt) + offset - 1
        for position in range(at):
            runner.forward(Batch((Span(request, position, (tokens[position],), 0),)), VERIFY)
        last = Batch((Span(request, at, (tokens[at],), 1),))
        assert same_bits(runner.forward(last, DRAFT)[0], found[offset])


def _request(decoder: Decoder, script: Script):
    from qspec_llm.eval.forced import _requests

    return _requests([script], ByteTokenizer())[0]


def test_drafts_leave_nothing_behind(decoder: Decoder, scripts: list[Script]) -> None:
    with_drafts = steps(decoder, scripts, 4)
    runners = {"verify": runner_for(decoder, scripts, 4)}
    without = list(read_along(runners, scripts, ByteTokenizer(), max_batch=4))
    for left, right in zip(with_drafts, without, strict=True):
        assert left.scripts == right.scripts
        assert same_bits(left.logits["verify"], right.logits["verify"])


def test_scripts_of_any_length_are_read(decoder: Decoder) -> None:
    scripts = [Script((1, 2), ()), Script((3,), (4, 5, 6)), Script((7,), (8,))]
    counted: dict[int, int] = {}
    for step in steps(decoder, scripts, 2):
        for index in step.scripts:
            counted[index] = counted.get(index, 0) + 1
    assert counted == {1: 3, 2: 1}


def test_one_view_is_the_whole_model(decoder: Decoder, scripts: list[Script]) -> None:
    """Its prompt is in the draft view too, so it differs from a draft over the verifier's KV."""
    runners = {
        "verify": runner_for(decoder, scripts, 4),
        "alone": OneView(runner_for(decoder, scripts, 4), replace(DRAFT)),
    }
    drafts = {"a8": DRAFT}
    found = list(read_along(runners, scripts, ByteTokenizer(), drafts=drafts, max_batch=4))
    assert any(not torch.equal(step.logits["alone"], step.logits["a8"]) for step in found)
    first = next(step for step in found if 0 in step.scripts)  # a prompt of one token: no KV yet
    row = first.scripts.index(0)
    assert same_bits(first.logits["alone"][row], first.logits["a8"][row])
