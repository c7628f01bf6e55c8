"""`qspec eval` without a terminal: one model, all of its views, figures as plain values."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qspec_llm.config import DEFAULT_GROUP
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.runner import Runner
from qspec_llm.errors import QSpecError
from qspec_llm.eval.acceptance import Acceptance, decode, decode_watched
from qspec_llm.eval.divergence import Divergence, measure
from qspec_llm.eval.forced import Script, Step, read_along, runner_for
from qspec_llm.eval.prompts import EvalPrompt
from qspec_llm.hub import resolve_model
from qspec_llm.llm import LLM
from qspec_llm.model.config import ModelConfig, read_config
from qspec_llm.model.decoder import Decoder
from qspec_llm.model.load import load_decoder
from qspec_llm.weights.checkpoint import open_checkpoint
from qspec_llm.weights.lora import merge
from qspec_llm.weights.quantize import Recipe, Target
from qspec_llm.weights.view import View

__all__ = [
    "Answers",
    "Reference",
    "Track",
    "advance_by",
    "answer_prompts",
    "encode_prompts",
    "evaluate_answers",
    "evaluate_text",
    "load_reference",
    "windows",
]

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]  # values, how many, what they are


@dataclass(frozen=True)
class Reference:
    """The 16-bit weights that views are compared with.

    `decoder` is None where the model's own verify view reproduces them, or stands for them since
    they are not at hand; `name` says which.
    """

    decoder: Decoder | None
    name: str


@dataclass(frozen=True)
class Answers:
    """Greedy answers to prompts: decoded plainly, and with drafts."""

    scripts: tuple[Script, ...]
    texts: tuple[str, ...]
    acceptance: Acceptance
    is_identical: bool


def load_reference(llm: LLM, model: str | Path | None = None) -> Reference:
    """The original weights of a loaded model, in bf16.

    Args:
        llm: the model under evaluation.
        model: where the originals are; by default where `llm` came from, if that holds them.

    Raises:
        QSpecError: `model` is another architecture.
    """
    checkpoint = open_checkpoint(resolve_model(model if model is not None else llm.model))
    if model is None:
        if llm.config.target is Target.BF16:
            return Reference(None, "the verify view, which reproduces the 16-bit weights")
        if checkpoint.kind == "nested":
            return Reference(None, "the verify view: the 16-bit weights were not given")
    if model is None and llm.lora is not None:
        checkpoint = merge(checkpoint, llm.lora)
    config = read_config(checkpoint)
    _check_same(config, llm.model_config)
    name = "16-bit weights"
    if any(checkpoint.type_name(tensor).startswith("Q") for tensor in checkpoint.names()):
        name = "16-bit weights, dequantised from what the file ships"
    return Reference(
        load_decoder(
            checkpoint,
            config,
            # the codes do not matter: only the verify view is read
            Recipe(Target.BF16, group=DEFAULT_GROUP, clip_steps=1),
            llm.decoder.ops,
            num_positions=llm.decoder.cos.shape[0],
        ),
        name,
    )


def _check_same(reference: ModelConfig, model: ModelConfig) -> None:
    for field in ("family", "vocab_size", "hidden_size", "num_layers"):
        theirs, ours = getattr(reference, field), getattr(model, field)
        if theirs != ours:
            raise QSpecError(
                f"the reference has {field} {theirs}, the model {ours}: it is not its original"
            )


def windows(tokens: Sequence[int], width: int) -> list[Script]:
    """A text cut into windows, each scored on its own from its second token on.

    Raises:
        QSpecError: there is no second token.
    """
    if len(tokens) < 2:
        raise QSpecError("the text has fewer than two tokens; perplexity needs more")
    cuts = [tuple(tokens[first : first + width]) for first in range(0, len(tokens), width)]
    return [Script(cut[:1], cut[1:]) for cut in cuts if len(cut) > 1]


def evaluate_text(
    llm: LLM,
    reference: Reference,
    scripts: Sequence[Script],
    drafts: Mapping[str, View],
    *,
    max_batch: int,
    track: Track,
) -> dict[str, Any]:
    """Perplexity, divergence and flips of every view on known text."""
    figures: dict[str, Divergence] = {}
    for step in _steps(llm, reference, scripts, drafts, max_batch, track, "reading the text"):
        measure(figures, step, reference=_reference_name(reference))
    return {name: figure.summary() for name, figure in figures.items()}


def encode_prompts(llm: LLM, prompts: Sequence[EvalPrompt]) -> list[list[int]]:
    """Token ids, by the chat template where the model has one."""
    if not llm.tokenizer.has_chat_template:
        return [llm.encode(prompt.prompt) for prompt in prompts]
    return [
        llm.tokenizer.encode_chat([{"role": "user", "content": prompt.prompt}])
        for prompt in prompts
    ]


def answer_prompts(
    llm: LLM, prompts: Sequence[Sequence[int]], *, max_tokens: int, gamma: int, track: Track
) -> Answers:
    """Answer prompts greedily, plainly and with `gamma` drafts a cycle."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    plain = decode(
        llm, llm.new_engine(0), prompts, params, advance_by(track, len(prompts), "decoding plainly")
    )
    advance = advance_by(track, len(prompts), "decoding with drafts")
    drafted, acceptance = decode_watched(llm, llm.new_engine(gamma), prompts, params, advance)
    return Answers(
        scripts=tuple(Script(r.prompt, tuple(r.output)) for r in plain),
        texts=tuple(request.text.text for request in plain),
        acceptance=acceptance,
        is_identical=[r.output for r in plain] == [r.output for r in drafted],
    )


def evaluate_answers(
    llm: LLM,
    reference: Reference,
    answers: Answers,
    kinds: Sequence[str],
    drafts: Mapping[str, View],
    *,
    max_batch: int,
    track: Track,
) -> dict[str, dict[str, Any]]:
    """Agreement and divergence of every view on the verify view's own answers, by kind of prompt.

    Args:
        kinds: of the prompts, in the order of the answers; "all" is added.
    """
    figures: dict[str, dict[str, Divergence]] = {kind: {} for kind in (*sorted({*kinds}), "all")}
    text = "reading the answers"
    for step in _steps(llm, reference, answers.scripts, drafts, max_batch, track, text):
        for kind in {kinds[index] for index in step.scripts}:
            rows = [row for row, index in enumerate(step.scripts) if kinds[index] == kind]
            measure(figures[kind], _rows(step, rows), reference=_reference_name(reference))
    for part in [figures[kind] for kind in figures if kind != "all"]:
        for name, figure in part.items():
            _merge(figures["all"].setdefault(name, Divergence()), figure)
    return {
        kind: {name: figure.summary() for name, figure in part.items()}
        for kind, part in figures.items()
    }


def _steps(
    llm: LLM,
    reference: Reference,
    scripts: Sequence[Script],
    drafts: Mapping[str, View],
    max_batch: int,
    track: Track,
    text: str,
) -> Iterator[Step]:
    runners: dict[str, Runner] = {"verify": runner_for(llm.decoder, scripts, max_batch)}
    if reference.decoder is not None:
        runners["reference"] = runner_for(reference.decoder, scripts, max_batch)
    groups = [
        max((len(s.continuation) for s in scripts[first : first + max_batch]), default=0)
        for first in range(0, len(scripts), max_batch)
    ]
    steps = read_along(runners, scripts, llm.tokenizer, drafts=drafts, max_batch=max_batch)
    yield from track(steps, sum(groups), text)


def _reference_name(reference: Reference) -> str:
    return "verify" if reference.decoder is None else "reference"


def _rows(step: Step, rows: list[int]) -> Step:
    return Step(
        tuple(step.scripts[row] for row in rows),
        step.next_tokens[rows],
        {name: logits[rows] for name, logits in step.logits.items()},
    )


def _merge(total: Divergence, part: Divergence) -> None:
    total.num_tokens += part.num_tokens
    total.nll += part.nll
    total.kl += part.kl
    total.flips += part.flips
    total.overlap += part.overlap
    for k, hits in part.hits.items():
        total.hits[k] += hits


def advance_by(track: Track, total: int, text: str) -> Callable[[int], None]:
    """`track` as something to call, for loops that are not over values."""
    bar = iter(track(range(total), total, text))

    def advance(count: int) -> None:
        for _ in range(count):
            next(bar, None)

    return advance
