"""QSpec's claim, tested: drafting with 4-bit activations does not cost what they cost alone.

Four ways to answer the same prompts greedily (Zhao et al. 2025, table 2): the 16-bit weights (W16),
the target (W4A16), the draft view as a model of its own, prompts and KV included (W4A4), and QSpec,
which drafts with the last and verifies with the second.
"""

from collections.abc import Sequence
from typing import Any

from qspec_llm.engine.engine import Engine
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.runner import Runner
from qspec_llm.eval.acceptance import decode, decode_watched
from qspec_llm.eval.divergence import Divergence, measure
from qspec_llm.eval.evaluate import Reference, Track, advance_by, encode_prompts
from qspec_llm.eval.forced import OneView, Script, read_along, runner_for
from qspec_llm.eval.grade import grade
from qspec_llm.eval.prompts import EvalPrompt
from qspec_llm.kv.blocks import blocks_for
from qspec_llm.kv.pool import allocate
from qspec_llm.llm import LLM
from qspec_llm.model.decoder import Decoder
from qspec_llm.weights.quantize import Target
from qspec_llm.weights.view import View

__all__ = ["compare"]

WEIGHTS = {Target.INT4: "W4", Target.INT8: "W8", Target.BF16: "W16"}


def compare(
    llm: LLM,
    reference: Reference,
    prompts: Sequence[EvalPrompt],
    *,
    gamma: int,
    max_tokens: int,
    max_batch: int,
    can_execute: bool,
    track: Track,
) -> dict[str, Any]:
    """Answer prompts in every way; figures by system.

    Args:
        llm: the target, with the draft view to test.
        reference: the 16-bit weights; where they are the target's own, W16 is left out.
        prompts: those that can be checked count for accuracy, all for the rest.
        gamma: tokens that QSpec drafts in each cycle.
        max_tokens: of an answer.
        max_batch: prompts that run at once.
        can_execute: run the code of answers to check it (`grade`).
        track: shows progress.

    Returns:
        By system: "accuracy" by kind of prompt ([right, checked]), "same_answers" and "same_prefix"
        (share of answers, and of tokens before the first other one, that equal the target's),
        and "kl_mean", "flips" against W16 on W16's own answers (the target's where that is left
        out); QSpec has no such row, its logits are the target's.
    """
    ids = encode_prompts(llm, prompts)
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    draft, weights = llm.config.draft_view, WEIGHTS[llm.config.target]
    target, alone = f"{weights}A16", f"W4{draft.activation.value.upper()}"
    speculative = f"QSpec ({alone} -> {target})"
    length = max(map(len, ids)) + max_tokens
    engines = {} if reference.decoder is None else {
        "W16": _engine(llm, reference.decoder, length, max_batch)
    }  # fmt: skip
    engines[target] = _engine(llm, llm.decoder, length, max_batch)
    engines[alone] = _engine(llm, llm.decoder, length, max_batch, draft)
    outputs, texts = {}, {}
    for name, engine in engines.items():
        advance = advance_by(track, len(ids), f"answering: {name}")
        requests = decode(llm, engine, ids, params, advance)
        outputs[name] = [request.output for request in requests]
        texts[name] = [request.text.text for request in requests]
    advance = advance_by(track, len(ids), f"answering: {speculative}")
    requests, acceptance = decode_watched(llm, llm.new_engine(gamma), ids, params, advance)
    outputs[speculative] = [request.output for request in requests]
    texts[speculative] = [request.text.text for request in requests]

    first = next(iter(engines))
    scripts = [Script(tuple(p), tuple(o)) for p, o in zip(ids, outputs[first], strict=True)]
    figures = _divergence(llm, reference, scripts, target, alone, max_batch, track)
    return {
        "reference": first,
        "target": target,
        "identical": outputs[speculative] == outputs[target],
        "acceptance_rate": acceptance.rate,
        "acceptance_by_position": acceptance.by_position,
        "mean_tokens_per_cycle": acceptance.tokens_per_cycle,
        "systems": {
            name: {
                "accuracy": _accuracy(prompts, texts[name], can_execute),
                **_sameness(outputs[name], outputs[target]),
                **figures.get(name, {}),
            }
            for name in outputs
        },
    }


def _engine(
    llm: LLM, decoder: Decoder, length: int, max_batch: int, view: View | None = None
) -> Engine:
    """Plain decoding of a decoder, in the verify view or wholly in another one."""
    num_blocks = blocks_for(length) * max_batch
    runner = Runner(
        decoder, allocate(decoder.config, num_blocks, decoder.dtype, decoder.ops.device)
    )
    if view is not None:
        runner = OneView(runner, view)
    return Engine(runner, llm.tokenizer, llm.config.draft_view, gamma=0, max_batch=max_batch)


def _divergence(
    llm: LLM,
    reference: Reference,
    scripts: Sequence[Script],
    target: str,
    alone: str,
    max_batch: int,
    track: Track,
) -> dict[str, dict[str, Any]]:
    """Figures of the target and of the draft alone against the reference."""
    runners: dict[str, Runner] = {target: runner_for(llm.decoder, scripts, max_batch)}
    if reference.decoder is not None:
        runners["W16"] = runner_for(reference.decoder, scripts, max_batch)
    own = runner_for(llm.decoder, scripts, max_batch)
    runners[alone] = OneView(own, llm.config.draft_view)
    figures: dict[str, Divergence] = {}
    against = "W16" if reference.decoder is not None else target
    total = sum(len(script.continuation) for script in scripts)
    advance = advance_by(track, total, "reading the answers")
    for step in read_along(runners, scripts, llm.tokenizer, max_batch=max_batch):
        measure(figures, step, reference=against, verify=target)
        advance(len(step.scripts))
    kept = ("tokens", "kl_mean", "kl_p99", "flips", "agreement")
    return {name: {key: f.summary()[key] for key in kept} for name, f in figures.items()}


def _accuracy(
    prompts: Sequence[EvalPrompt], texts: Sequence[str], can_execute: bool
) -> dict[str, list[int]]:
    """By kind of prompt: answers that are right, and that could be checked."""
    counts: dict[str, list[int]] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        if (is_right := grade(prompt, text, can_execute=can_execute)) is not None:
            count = counts.setdefault(prompt.kind, [0, 0])
            count[0] += is_right
            count[1] += 1
    return counts


def _sameness(outputs: Sequence[list[int]], target: Sequence[list[int]]) -> dict[str, float]:
    """Share of whole answers, and of tokens before the first other one, that equal the target's."""
    pairs = list(zip(outputs, target, strict=True))
    prefix = sum(_common(own, other) for own, other in pairs)
    return {
        "same_answers": sum(own == other for own, other in pairs) / len(pairs),
        "same_prefix": prefix / sum(len(other) for _, other in pairs),
    }


def _common(own: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(own, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(own), len(other)))
