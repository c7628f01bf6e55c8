"""`qspec plan`: what the draft of a nested checkpoint should read on this machine."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from qspec_llm.hub import resolve_model
from qspec_llm.quantize.plan import Plan, make_plan
from qspec_llm.quantize.text import encode, read_samples
from qspec_llm.tokenizer import HFTokenizer

__all__ = ["run", "sentence"]


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    path = Path(resolve_model(args.model))
    text = encode(read_samples(args.calibration), HFTokenizer(path), args.calibration_tokens)
    plan = make_plan(path, text, threads=args.threads)
    print(json.dumps(asdict(plan)) if args.json else sentence(plan))


def sentence(plan: Plan) -> str:
    """What a plan is and promises."""
    if not plan.gamma:
        return "plan: decode plainly; no draft is expected to pay on this machine"
    eight = f", {len(plan.eight_bits)} tensors at 8 bits" if plan.eight_bits else ""
    return (
        f"plan: {plan.draft.value} drafts{eight}, gamma {plan.gamma}: {plan.agreement:.1%} of the "
        f"drafts accepted and {plan.speedup:.2f}x plain decoding expected for one request here"
    )
