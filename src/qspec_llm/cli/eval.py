"""`qspec eval`: how faithful each view of a model is, in figures, tables and plots."""

import argparse
import importlib.util
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
from qspec_llm.eval.fidelity import compare
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
    for option, least in (("limit", 1), ("window", 2)):
        if (value := getattr(args, option)) is not None and value < least:
            raise QSpecError(f"{option} is {value}; it must be at least {least}")
    if args.plot and args.output is None:
        raise QSpecError("--plot needs -o DIR, where the files go")
    if args.plot:
        need_pyplot()  # before an hour of work, not after it
    if args.tasks:
        _need_lm_eval()
    llm = load(args)
    report: dict[str, Any] = {
        "version": __version__,
        "model": str(llm.model),
        "target": llm.config.target.value,
        "draft": llm.config.draft.value,
        "gamma": args.gamma,
        "backend": llm.config.backend,
    }
    if args.tasks:
        report["tasks"] = _tasks(args, llm)
    else:
        reference = load_reference(llm, args.reference)
        work = _fidelity if args.fidelity else _evaluate
        report |= work(args, llm, reference)
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
    options: dict[str, Any] = {"max_batch": args.max_batch, "track": _track}
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
            llm, ids, max_tokens=args.max_tokens, gamma=args.gamma, track=_track
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


def _need_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise QSpecError("--tasks needs lm-eval; install it with `pip install 'qspec-llm[eval]'`")


def _tasks(args: argparse.Namespace, llm: LLM) -> dict[str, Any]:
    from qspec_llm.eval.lm_eval import evaluate_tasks

    return evaluate_tasks(
        llm,
        args.tasks,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        apply_chat_template=args.apply_chat_template,
    )


def _fidelity(args: argparse.Namespace, llm: LLM, reference: Reference) -> dict[str, Any]:
    if args.prompts == "none":
        raise QSpecError("--fidelity answers prompts; --prompts none leaves it nothing to do")
    prompts = read_prompts(args.prompts, args.limit)
    figures = compare(
        llm,
        reference,
        prompts,
        gamma=args.gamma,
        max_tokens=args.max_tokens,
        max_batch=args.max_batch,
        can_execute=args.execute_code,
        track=_track,
    )
    about = {"file": args.prompts, "prompts": len(prompts), "max_tokens": args.max_tokens}
    return {"reference": reference.name, "fidelity": about | figures}


def _track(values: Iterable[Any], total: int, text: str) -> Iterable[Any]:
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
    about = f"; reference: {report['reference']}" if "reference" in report else ""
    console.print(f"{report['model']}: {report['target']} target{about}")
    for task, figures in report.get("tasks", {}).items():
        numbers = {k: v for k, v in figures.items() if isinstance(v, float)}
        console.print(task, ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
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
    if "fidelity" in report:
        _show_fidelity(console, report["fidelity"])
    for path in report.get("plots", ()):
        console.print(path)


def _show_fidelity(console: Console, figures: dict[str, Any]) -> None:
    console.print(f"\ngreedy answers to {figures['prompts']} prompts of {figures['file']}")
    kinds = sorted({kind for row in figures["systems"].values() for kind in row["accuracy"]})
    table = Table(box=None, pad_edge=False)
    columns = ("same_answers", "same_prefix", "kl_mean", "flips")
    for title in ("system", *kinds, *columns):
        table.add_column(title.replace("_", " "), justify="left" if title == "system" else "right")
    for name, row in figures["systems"].items():
        right = ["{}/{}".format(*row["accuracy"].get(kind, (0, 0))) for kind in kinds]
        shares = [f"{row[column]:.4f}" if column in row else "" for column in columns]
        table.add_row(name, *right, *shares)
    console.print(table)
    console.print(
        f"same: as {figures['target']}; kl and flips: on {figures['reference']}'s answers, "
        "and QSpec's logits are its target's"
    )
    if figures["acceptance_rate"] is not None:
        console.print(f"{figures['acceptance_rate']:.3f} of the tested drafts were accepted")
    console.print(
        f"QSpec's answers are {figures['target']}'s, token for token"
        if figures["identical"]
        else f"QSPEC'S ANSWERS DIFFER from {figures['target']}'s: this is a bug, please report it"
    )


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
