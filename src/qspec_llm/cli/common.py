"""What the commands share: loading with progress, sampling options, writing coloured tokens."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from qspec_llm.engine.emit import Segment
from qspec_llm.engine.params import SamplingParams
from qspec_llm.errors import QSpecError
from qspec_llm.llm import LLM

__all__ = [
    "check_prompt",
    "load",
    "progress_bar",
    "read_prompt_file",
    "sampling_params",
    "write_segments",
]

DRAFTED_STYLE, VERIFIED_STYLE = "green", "bold yellow"


def progress_bar(*, is_long: bool = False) -> Progress:
    """A bar on stderr, with the time left where it `is_long`; silent where that is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *([TimeRemainingColumn()] if is_long else []),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def load(args: argparse.Namespace) -> LLM:
    """Load the model that the options name, with a progress bar."""
    with progress_bar() as bar:
        task = bar.add_task("reading and nesting weights", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        llm = LLM(
            args.model,
            target=args.target,
            draft=args.draft,
            gamma=args.gamma,
            group=args.group,
            lora=args.lora,
            max_batch=args.max_batch,
            max_tokens_in_kv=args.max_tokens_in_kv,
            kv_cache_bytes=args.kv_cache_bytes,
            max_rows=args.max_rows,
            threads=args.threads,
            isa=args.isa,
            backend=args.backend,
            progress=show,
        )
    for note in _notes(llm, is_default=args.gamma is None):
        print(f"qspec: note: {note}", file=sys.stderr)
    return llm


def _notes(llm: LLM, *, is_default: bool) -> Iterator[str]:
    """What to expect of options that are allowed but seldom wanted, or chosen for the caller."""
    if llm.config.gamma == 0 and is_default:
        yield (
            f"the {llm.config.target} target decodes plainly by default, since its draft saves too "
            "few bytes to pay; --gamma N drafts all the same"
        )
    is_prepared = llm.model_config.can_draft_a4
    if llm.config.draft == "a4" and llm.config.gamma and not is_prepared:
        yield (
            "4-bit activations agree seldom on weights made without --rotate or --outliers (on 0.6 "
            "to 0.7 of the tokens of SmolLM2); the text stays the same, drafting will hardly pay"
        )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Sampling parameters from the options."""
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
    )


def write_segments(console: Console, segments: Iterable[Segment]) -> None:
    """Write text as it comes; on a terminal, drafted and verified tokens in different colours."""
    for segment in segments:
        if console.is_terminal:
            style = DRAFTED_STYLE if segment.is_drafted else VERIFIED_STYLE
            console.print(
                segment.text, style=style, end="", markup=False, highlight=False, soft_wrap=True
            )
        else:
            sys.stdout.write(segment.text)
    sys.stdout.flush()


def check_prompt(text: str) -> None:
    """Refuse a prompt with nothing in it."""
    if not text.strip():
        raise QSpecError("a prompt is empty; it needs at least one visible character")


def read_prompt_file(file: str) -> list[str]:
    """Prompts of a JSON Lines file, {"prompt": ...} each; blank lines are skipped."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise QSpecError(f"the prompt file {file} cannot be read: {error}") from None
    texts = [_prompt_of_line(file, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise QSpecError(f"the prompt file {file} holds no prompts")
    return texts


def _prompt_of_line(file: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise QSpecError(f"line {number} of {file} is not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise QSpecError(f'line {number} of {file} is not an object like {{"prompt": "..."}}')
    if unknown := value.keys() - {"prompt"}:
        raise QSpecError(f"line {number} of {file} has an unknown key {min(unknown)!r}")
    check_prompt(value["prompt"])
    return str(value["prompt"])
