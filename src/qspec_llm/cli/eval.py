"""`qspec eval`: how faithful each view of a model is, in figures, tables and plots."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qspec_llm.cli.common import load, progress_bar
from qspec_llm.errors import QSpecError
from qspec_llm.eval.evaluate import (
    Reference,
    answer_prompts,
    encode_prompts,
    evaluate_answers,
    evaluate_text,
    load_reference,
    windows,
)
from qspec_llm.eval.plot import need_pyplot, plot_acceptance, plot_views
from qspec_llm.eval.prompts import evaluation_text, read_prompts
from qspec_llm.llm import LLM
from qspec_llm.version import __version__
from qspec_llm.weights.view import Activation, draft_view

__all__ = ["run"]

DEFAULT_GAMMA = 4  # long enough to see how acceptance falls with the position
COLUMNS = ("perplexity", "kl_mean", "kl_p99", "flips", "agreement", "agreement_top2", "overlap")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.gamma is None:
        args.gamma = DEFAULT_GAMMA
    if args.gamma == "auto":
        raise QSpecError("gamma is 'auto'; acceptance by position needs a number")
    if args.plot and args.output is None:
        raise QSpecError("--plot needs -o DIR, where the files go")
    if args.plot:
        need_pyplot()  # before an hour of work, not after it
    llm = load(args)
    report: dict[str, Any] = {
        "version": __version__,
        "model": str(llm.model),
        "target": llm.config.target.value,
        "draft": llm.config.draft.value,
        "gamma": args.gamma,
        "group": llm.config.group,
        "backend": llm.config.backend,
    }
    report |= _evaluate(args, llm, load_reference(llm, args.reference))
    if args.output is not None:
        _write(args, report)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _show(report)


def _evaluate(args: argparse.Namespace, llm: LLM, reference: Reference) -> dict[str, Any]:
    drafts = {name: draft_view(Activation(name)) for name in args.views}
    if llm.config.draft not in drafts:
        drafts[llm.config.draft.value] = llm.config.draft_view
    report: dict[str, Any] = {"reference": reference.name}
    options: dict[str, Any] = {"max_batch": args.max_batch, "track": track}
    if args.text != "none":
        tokens = llm.encode(evaluation_text(args.text))
        scripts = windows(tokens, args.window)
        report["text"] = {
            "file": args.text,
            "window": args.window,
            "views": evaluate_text(llm, reference, scripts, drafts, **options),
        }
    if args.prompts != "none":
        prompts = read_prompts(args.prompts, args.limit)
        kinds = [prompt.kind for prompt in prompts]
        ids = encode_prompts(llm, prompts)
        answers = answer_prompts(
            llm, ids, max_tokens=args.max_tokens, gamma=args.gamma, track=track
        )
        acceptance = answers.acceptance
        report["answers"] = {
            "file": args.prompts,
            "prompts": len(prompts),
            "max_tokens": args.max_tokens,
            "tokens": sum(len(script.continuation) for script in answers.scripts),
            "identical": answers.is_identical,
            "acceptance_rate": acceptance.rate,
            "acceptance_by_position": acceptance.by_position,
            "mean_tokens_per_cycle": acceptance.tokens_per_cycle,
            "views": evaluate_answers(llm, reference, answers, kinds, drafts, **options),
        }
    return report


def track(values: Iterable[Any], total: int, text: str) -> Iterable[Any]:
    """The values, with a progress bar on a terminal."""
    with progress_bar() as bar:
        yield from bar.track(values, total=total, description=text)


def _write(args: argparse.Namespace, report: dict[str, Any]) -> None:
    directory = Path(args.output)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "eval.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    except OSError as error:
        raise QSpecError(f"{directory} cannot be written: {error.strerror}") from None
    if args.plot and "answers" in report:
        answers = report["answers"]
        title = f"{report['model']}, {report['target']} target, {report['draft']} draft"
        paths = plot_views(answers["views"], directory, f"{report['model']}, {report['target']}")
        if answers["acceptance_by_position"]:
            paths += plot_acceptance(answers["acceptance_by_position"], directory, title)
        report["plots"] = [str(path) for path in paths]


def _show(report: dict[str, Any]) -> None:
    # piped into a file or a pager, nothing is folded
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(f"{report['model']}: {report['target']} target; reference: {report['reference']}")
    if "text" in report:
        text = report["text"]
        console.print(f"\ntext {text['file']}, windows of {text['window']} tokens")
        console.print(_table({"text": text["views"]}, COLUMNS))
    if "answers" in report:
        answers = report["answers"]
        console.print(
            f"\ngreedy answers to {answers['prompts']} prompts of {answers['file']}, "
            f"{answers['tokens']} tokens"
        )
        console.print(_table(answers["views"], COLUMNS[1:]))
        if answers["acceptance_rate"] is not None:
            shares = ", ".join(f"{share:.3f}" for share in answers["acceptance_by_position"])
            console.print(
                f"{report['draft']} draft, gamma {report['gamma']}: "
                f"{answers['acceptance_rate']:.3f} of the tested drafts were accepted, "
                f"by position {shares}; {answers['mean_tokens_per_cycle']:.2f} tokens a cycle"
            )
        console.print(
            "every token is identical to plain decoding"
            if answers["identical"]
            else "TOKENS DIFFER from plain decoding: this is a bug, please report it"
        )
    for path in report.get("plots", ()):
        console.print(path)


def _table(by_kind: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens of" if len(by_kind) > 1 else "")
    table.add_column("view")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for kind, views in by_kind.items():
        for name, figures in views.items():
            table.add_row(kind, name, *(f"{figures[column]:.4f}" for column in columns))
    return table
