"""`qspec quantize`: write a nested checkpoint whose draft agrees with its target."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qspec_llm.cli.common import progress_bar
from qspec_llm.cli.plan import sentence
from qspec_llm.config import parse_choice, resolve_target
from qspec_llm.errors import QSpecError
from qspec_llm.hub import resolve_model
from qspec_llm.quantize.driver import Options, Report, quantize
from qspec_llm.quantize.matrices import Method
from qspec_llm.quantize.plan import Plan, make_plan, set_draft_bits
from qspec_llm.quantize.text import encode, read_samples
from qspec_llm.tokenizer import HFTokenizer
from qspec_llm.weights.checkpoint import open_checkpoint
from qspec_llm.weights.lora import merge
from qspec_llm.weights.quantize import Target
from qspec_llm.weights.view import Activation

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.calibration_tokens < 1:
        raise QSpecError(f"calibration_tokens is {args.calibration_tokens}; it must be at least 1")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    path = resolve_model(args.model)
    checkpoint = open_checkpoint(path)
    if args.lora is not None:
        checkpoint = merge(checkpoint, Path(args.lora))
    options = Options(
        target=resolve_target(args.target, checkpoint),
        method=parse_choice(Method, args.method, "method"),
        group=args.group,
        draft=parse_choice(Activation, args.draft, "draft"),
        rotate=args.rotate,
        outliers=args.outliers,
        asymmetric=args.asymmetric,
    )
    has_codes = checkpoint.kind == "gguf" and resolve_target("auto", checkpoint) is Target.INT4
    if options.target is Target.INT4 and has_codes:
        print(
            f"qspec: note: {path.name} has 4-bit codes of its own, which are dequantised and "
            "chosen anew; without `qspec quantize` they are used as they are",
            file=sys.stderr,
        )
    tokenizer = HFTokenizer(path)
    text = encode(read_samples(args.calibration), tokenizer, args.calibration_tokens)
    with progress_bar(is_long=True) as bar:
        task = bar.add_task(f"quantising with {options.method.value}", total=None)
        report = quantize(
            checkpoint,
            Path(args.output),
            options,
            text,
            write_more=tokenizer.save,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    plan = None
    if args.draft_bits == "auto":
        plan = make_plan(Path(args.output), text, threads=args.threads).plan
    else:
        set_draft_bits(Path(args.output), int(args.draft_bits))
    if args.json:
        print(json.dumps(_values(args, options, report, plan)))
        return
    _show(args, options, report)
    if plan is not None:
        print(sentence(plan))


def _values(
    args: argparse.Namespace, options: Options, report: Report, plan: Plan | None
) -> dict[str, Any]:
    return {
        "model": args.model,
        "output": args.output,
        **asdict(options),
        "agreement": report.agreement,
        "plan": None if plan is None else plan.to_dict(),
        "bytes": {"weights": report.stored_bytes, "read_by_draft": report.draft_bytes},
        "layers": [asdict(layer) for layer in report.layers],
    }


def _show(args: argparse.Namespace, options: Options, report: Report) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    layers = [layer for layer in report.layers if layer.errors]
    table = Table(box=None, pad_edge=False)
    table.add_column("part")
    modules = [_short(name) for name in layers[0].errors] if layers else []
    for title in (*modules, "bytes", "read by the draft"):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in report.layers:
        errors = [f"{error:.4f}" for error in layer.errors.values()] or [""] * len(modules)
        table.add_row(layer.name, *errors, f"{layer.stored_bytes:,}", f"{layer.draft_bytes:,}")
    console.print("error of each linear's output in parts of its square, on text that was held out")
    console.print(table)
    stored, drafted = report.stored_bytes, report.draft_bytes
    console.print(
        f"{args.output}: {options.target.value} target by {options.method.value}, {stored:,} "
        f"bytes, of which the {options.draft.value} draft reads {drafted:,} "
        f"({drafted / stored:.0%})"
    )
    if report.agreement is not None:
        who = "the target" if options.target == "int4" else "the draft"
        console.print(
            f"{who} picks the 16-bit model's token on {report.agreement:.1%} of held-out answers"
        )


def _short(name: str) -> str:
    return name.rpartition(".")[2].removesuffix("_proj")
