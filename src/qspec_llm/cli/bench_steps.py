"""`qspec bench steps`: draft and verify steps, and the same steps of two versions in turn."""

import argparse
import sys
from typing import Any

from qspec_llm.bench import steps, turns
from qspec_llm.cli.bench_models import checkpoint_of, load_targets, model_name
from qspec_llm.cli.common import progress_bar
from qspec_llm.errors import QSpecError
from qspec_llm.hub import resolve_model
from qspec_llm.kernels import get_backend
from qspec_llm.model.config import ModelConfig, read_config
from qspec_llm.model.decoder import Decoder
from qspec_llm.tokenizer import HFTokenizer
from qspec_llm.weights.view import Activation

__all__ = ["run"]

IN_TURN = "--in-turn"  # how a version is told to take turns with the one that started it


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, show and return the report; in turn with another version where that is wanted."""
    _check(args)
    if args.against is None:
        decoders, ready = _ready(args)
        if args.in_turn:
            turns.answer_turns(ready, sys.stdin, sys.stdout)
            return {}
        return _alone(args, decoders, ready)
    # It is started first, so that both get ready at a time. A backend "auto" is resolved by each.
    with turns.Other(args.against, _same_steps(args)) as other:
        _, ready = _ready(args)
        return _in_turn(args, ready, other)


def _check(args: argparse.Namespace) -> None:
    if (args.model is None) == (args.shape is None):
        raise QSpecError("give either a MODEL or --shape, so that one model is measured")
    for name in ("rows", "contexts", "batches", "rounds"):
        values = getattr(args, name)
        least = min(values) if isinstance(values, list) else values
        if least < 1:
            raise QSpecError(f"--{name} {least}: give numbers from 1 on")
    if 1 not in args.rows:
        raise QSpecError(
            f"--rows {' '.join(map(str, args.rows))}: 1, a plain step, must be among them, which "
            "all others are compared with"
        )


def _ready(args: argparse.Namespace) -> tuple[dict[str, Decoder], steps.Steps]:
    checkpoint = checkpoint_of(args)
    config = read_config(checkpoint)
    contexts = _contexts(args.contexts, config)
    decoders = load_targets(args, checkpoint, config, contexts[-1] + max(args.rows))
    draft = Activation(args.draft)
    return decoders, steps.Steps(decoders, draft, args.rows, contexts, args.batches)


def _contexts(contexts: list[int], config: ModelConfig) -> list[int]:
    longest = config.context_length - 16
    if max(contexts) > longest:
        raise QSpecError(f"context {max(contexts)} is too long; this model allows {longest}")
    return sorted(contexts)


def _alone(
    args: argparse.Namespace, decoders: dict[str, Decoder], ready: steps.Steps
) -> dict[str, Any]:
    with progress_bar() as bar:
        task = bar.add_task("steps", total=len(ready.cases) * (args.rounds + 1))
        costs = ready.seconds(args.rounds, lambda: bar.advance(task))
    report = {
        **_about(args),
        "steps": [{**_record(args, case), "seconds": seconds} for case, seconds in costs.items()],
        "summary": steps.summarise(costs, Activation(args.draft)),
        "host_share": _host_share(args, decoders),
    }
    if not args.json:
        _show(report)
    return report


def _in_turn(args: argparse.Namespace, ready: steps.Steps, other: turns.Other) -> dict[str, Any]:
    with progress_bar() as bar:
        task = bar.add_task("rounds of both versions", total=args.rounds + 1)
        found = turns.compare(ready, other, args.rounds, lambda: bar.advance(task))
    report = {
        **_about(args),
        "against": args.against,
        "steps": [
            {
                **_record(args, case),
                "seconds": one.seconds,
                "other_seconds": one.other_seconds,
                "ratio": one.ratio,
                "aa_ratio": one.aa_ratio,
                "has_same_bits": one.has_same_bits,
            }
            for case, one in found.items()
        ],
    }
    if not args.json:
        _show_in_turn(report)
    return report


def _same_steps(args: argparse.Namespace) -> list[str]:
    """The command line by which another version measures what this one does."""
    options = ["bench", "steps", *([args.model] if args.model else []), IN_TURN]
    for name in ("shape", "enlarge", "rows", "contexts", "batches", "targets", "draft", "group",
                 "threads", "isa", "backend"):  # fmt: skip
        value = getattr(args, name)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            options += [f"--{name}", *map(str, values)]
    return options


def _about(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "backend": args.backend,
        "model": model_name(args),
        "threads": get_backend(args.backend).num_threads(),
    }


def _record(args: argparse.Namespace, case: steps.StepCase) -> dict[str, Any]:
    return {
        "view": "draft" if case.view.is_draft else "verify",
        "target": case.target,
        "draft": args.draft if case.view.is_draft else None,
        "batch": case.batch,
        "rows": case.rows,
        "context": case.context,
    }


def _host_share(args: argparse.Namespace, decoders: dict[str, Decoder]) -> float | None:
    """Measured on the fastest target, where it is largest; None without a tokenizer."""
    if args.shape:
        return None
    tokenizer = HFTokenizer(resolve_model(args.model))
    return steps.host_share(next(iter(decoders.values())), tokenizer, num_steps=100)


def _show_heading(report: dict[str, Any]) -> None:
    print(f"{report['model']}, {report['backend']} backend, {report['threads']} threads")


def _label(step: dict[str, Any]) -> str:
    view = f"{step['view']} {step['draft'] or ''}".strip()
    return (
        f"  {step['target']:<5} {view:<9} batch {step['batch']:>3}  rows {step['rows']:>2}  "
        f"context {step['context']:>5}"
    )


def _show(report: dict[str, Any]) -> None:
    _show_heading(report)
    print("milliseconds (median):")
    for step in report["steps"]:
        print(f"{_label(step)}  {step['seconds'] * 1e3:9.3f}")
    for found in report["summary"]:
        v = ", ".join(f"{rows}: {ratio:.2f}" for rows, ratio in found["v"].items())
        print(f"{found['target']}, batch {found['batch']}: c = {found['c']:.3f}; v by rows: {v}")
        for acceptance, best in found["implied"].items():
            print(
                f"  acceptance {acceptance}: gamma {best['gamma']}, {best['speedup']:.2f}x of plain"
            )
    share = report["host_share"]
    print(
        "outside kernels: " + ("not measured" if share is None else f"{share:.1%} of a plain step")
    )


def _show_in_turn(report: dict[str, Any]) -> None:
    _show_heading(report)
    print(f"milliseconds (median), and in turn with {report['against']}:")
    for step in report["steps"]:
        ours, theirs = (1e3 * step[name] for name in ("seconds", "other_seconds"))
        print(
            f"{_label(step)}  {ours:9.3f}  other {theirs:9.3f}  {step['ratio']:.3f}x  "
            f"A/A {step['aa_ratio']:.3f}  "
            f"{'same bits' if step['has_same_bits'] else 'OTHER BITS'}"
        )
