"""`qspec plan`: what the draft of a nested checkpoint should read on this machine."""

import argparse
import json
from pathlib import Path

from qspec_llm.eval.plot import need_pyplot, plot_plan
from qspec_llm.hub import resolve_model
from qspec_llm.quantize.plan import Plan, Planned, make_plan
from qspec_llm.quantize.text import encode, read_samples
from qspec_llm.tokenizer import HFTokenizer

__all__ = ["draw", "run", "sentence"]


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.plot is not None:
        need_pyplot()
    path = Path(resolve_model(args.model))
    text = encode(read_samples(args.calibration), HFTokenizer(path), args.calibration_tokens)
    planned = make_plan(path, text, threads=args.threads)
    print(json.dumps(planned.plan.to_dict()) if args.json else sentence(planned.plan))
    if args.plot is not None:
        draw(planned, Path(args.plot), str(args.model))


def draw(planned: Planned, directory: Path, title: str) -> None:
    """Write plan.png and plan.svg."""
    divergences: dict[str, list[float]] = {}
    for unit in planned.units[:-1]:  # the LM head is no layer
        kind = "+".join(name.rpartition(".weight")[0].rpartition(".")[2] for name in unit.names)
        divergences.setdefault(kind.replace("_proj", ""), []).append(
            unit.divergence[4, planned.plan.draft]
        )
    plot_plan(
        {
            activation.value: [(plan.more_bytes, plan.agreement, plan.speedup) for plan in plans]
            for activation, plans in planned.candidates.items()
        },
        (planned.plan.more_bytes, planned.plan.speedup),
        divergences,
        directory,
        title,
    )


def sentence(plan: Plan) -> str:
    """What a plan is and promises."""
    if not plan.gamma:
        return "plan: decode plainly; no draft is expected to pay on this machine"
    eight = f", {len(plan.eight_bits)} tensors at 8 bits" if plan.eight_bits else ""
    return (
        f"plan: {plan.draft.value} drafts{eight}, gamma {plan.gamma}: {plan.agreement:.1%} of the "
        f"drafts accepted and {plan.speedup:.2f}x plain decoding expected for one request here"
    )
