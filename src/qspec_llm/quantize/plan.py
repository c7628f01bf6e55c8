"""Which planes and activations a draft should read: what promises the most tokens a second.

Three things are measured. One pass over text says what each linear's rounding adds to the draft's
divergence from its target (`sensitivity`). The engine's step costs say what a draft costs that
reads as little as it can, and one that reads r4 wherever it is stored; between them a plan is
charged by its bytes. The same text, read by both, gives agreement at two divergences, and the curve
through them gives that of any plan. The plan and what it promises are written into the checkpoint's
index, since which planes a draft reads does not change their bytes.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qspec_llm.engine.costs import COST_TOKENS, StepCosts, measure_costs
from qspec_llm.engine.gamma import TOP_GAMMA, expected_tokens
from qspec_llm.engine.runner import Runner
from qspec_llm.errors import QSpecError
from qspec_llm.eval.forced import Script, read_along, runner_for
from qspec_llm.kv.blocks import blocks_for
from qspec_llm.kv.pool import allocate
from qspec_llm.llm import LLM
from qspec_llm.model.config import read_config
from qspec_llm.quantize.sensitivity import Unit, measure
from qspec_llm.quantize.text import CalibrationText
from qspec_llm.weights.checkpoint.safetensors_dir import read_json
from qspec_llm.weights.store import INDEX_NAME, NestedCheckpoint
from qspec_llm.weights.view import Activation, draft_view

__all__ = [
    "Plan",
    "Planned",
    "choose",
    "expected_speedup",
    "least_costs",
    "make_plan",
    "set_draft_bits",
]

KEYS = 128  # that a step's rows see where plans are compared
PLAN_TOKENS = 2048  # of text that plans are judged by
LEAST_GAIN = 1.03  # of one plan over an earlier one: less is within the noise
ROUNDS, SECONDS = 3, 4.0  # in turn, of measured costs, for each kind of activations
MAX_BATCH = 16  # held-out texts that are read side by side


@dataclass(frozen=True)
class Plan:
    """What a draft reads, and what that promises for one request on this machine.

    Attributes:
        draft: activations.
        eight_bits: tensors that are drafted at 8 bits.
        gamma: tokens to draft in each cycle, 0 where drafting does not pay.
        agreement: expected share of drafts that are accepted.
        speedup: expected tokens a second over plain decoding's.
        more_bytes: that such a draft reads than one at 4 bits.
    """

    draft: Activation
    eight_bits: tuple[str, ...]
    gamma: int
    agreement: float
    speedup: float
    more_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint's index keeps; tensors say themselves how they are drafted."""
        return {**asdict(self), "eight_bits": len(self.eight_bits)}


@dataclass(frozen=True)
class Planned:
    """The plan that was chosen, what it was chosen from, and what that rests on.

    Attributes:
        plan: the best one.
        candidates: all, by activations, in the order of the bytes they read.
        units: the linears, layers in order and the LM head last.
    """

    plan: Plan
    candidates: dict[Activation, list[Plan]]
    units: list[Unit]


@dataclass(frozen=True)
class _Measured:
    """A draft with all units at one width: what its steps cost, and how often it agrees."""

    costs: StepCosts
    agreement: float


def make_plan(path: Path, text: CalibrationText, *, threads: int | None = None) -> Planned:
    """Measure a nested checkpoint, choose its plan, and write that into its index.

    Args:
        path: a nested checkpoint.
        text: calibration text; the beginning is read, and the held-out rest gives agreement.
        threads: of the kernels.
    """
    if not (path / INDEX_NAME).exists():
        raise QSpecError(f"{path} is no nested checkpoint; `qspec quantize` writes one")
    checkpoint = NestedCheckpoint(path)
    config = read_config(checkpoint)
    activations = [Activation.A8, Activation.A16]
    if config.can_draft_a4:
        activations.insert(0, Activation.A4)
    units = measure(checkpoint, config, checkpoint.target, text.first(PLAN_TOKENS))
    open_names = [name for unit in units if unit.more_bytes for name in unit.names]
    scripts = _held_out(text)
    measured: dict[tuple[int, Activation], _Measured] = {}
    for bits in (4, 8) if open_names else (4,):
        with _variant(path, dict.fromkeys(open_names, bits)) as variant:
            llm = LLM(variant, gamma=0, max_batch=1, threads=threads)
            costs, agreement = _costs(llm, activations), _agreement(llm, scripts, activations)
            for activation in activations:
                measured[bits, activation] = _Measured(costs[activation], agreement[activation])
    planned = choose(units, measured)
    index = _index(path)
    eight = planned.plan.eight_bits
    _set_bits(index, {name: 8 if name in eight else 4 for name in open_names})
    _write(path / INDEX_NAME, {**index, "plan": planned.plan.to_dict()})
    return planned


def set_draft_bits(path: Path, bits: int) -> None:
    """Let every 8-bit tensor of a nested checkpoint be drafted at 4 or 8 bits; drops its plan."""
    index = _index(path)
    eight = [name for name, record in index["tensors"].items() if record.get("bits") == 8]
    _set_bits(index, dict.fromkeys(eight, bits))
    index.pop("plan", None)
    _write(path / INDEX_NAME, index)


def choose(units: Sequence[Unit], measured: Mapping[tuple[int, Activation], _Measured]) -> Planned:
    """The best of all plans that take units in the order of what a byte of them buys."""
    activations = [activation for bits, activation in measured if bits == 4]
    candidates = {a: list(_plans(units, measured, a)) for a in activations}
    best, *others = [plan for plans in candidates.values() for plan in plans]
    for plan in others:
        if plan.speedup > LEAST_GAIN * best.speedup:
            best = plan
    return Planned(best, candidates, list(units))


def _plans(
    units: Sequence[Unit],
    measured: Mapping[tuple[int, Activation], _Measured],
    activation: Activation,
) -> Iterator[Plan]:
    """Plans of growing size for one kind of activations."""
    low = measured[4, activation]
    divergence = sum(unit.divergence[4, activation] for unit in units)
    yield _plan(activation, (), low.costs, low.agreement, 0)
    if (8, activation) not in measured:
        return
    high = measured[8, activation]
    open_units = sorted(
        (unit for unit in units if unit.more_bytes),
        key=lambda unit: _gain(unit, activation) / unit.more_bytes,
        reverse=True,
    )
    least = divergence - sum(_gain(unit, activation) for unit in open_units)
    all_bytes = sum(unit.more_bytes for unit in open_units)
    taken: list[str] = []
    num_bytes, left = 0, divergence
    for unit in open_units:
        taken += unit.names
        num_bytes += unit.more_bytes
        left -= _gain(unit, activation)
        agreement = _between((divergence, low.agreement), (least, high.agreement), max(left, least))
        costs = _mixed(low.costs, high.costs, num_bytes / all_bytes)
        yield _plan(activation, tuple(taken), costs, agreement, num_bytes)


def _gain(unit: Unit, activation: Activation) -> float:
    return unit.divergence[4, activation] - unit.divergence[8, activation]


def _between(low: tuple[float, float], high: tuple[float, float], divergence: float) -> float:
    """Agreement at a divergence: disagreement grows with its root, through two measured points."""
    (most, worst), (least, best) = low, high
    if most <= least:
        return best
    part = (math.sqrt(most) - math.sqrt(divergence)) / (math.sqrt(most) - math.sqrt(least))
    return worst + part * (best - worst)


def _mixed(low: StepCosts, high: StepCosts, share: float) -> StepCosts:
    """Costs of a draft that reads `share` of what `high` reads more; verify steps are the same."""
    draft = tuple(a + share * (b - a) for a, b in zip(low.draft, high.draft, strict=True))
    return StepCosts(**{**asdict(low), "draft": draft})


def _plan(
    activation: Activation,
    names: tuple[str, ...],
    costs: StepCosts,
    agreement: float,
    more_bytes: int,
) -> Plan:
    gamma = max(range(TOP_GAMMA + 1), key=lambda gamma: expected_speedup(costs, agreement, gamma))
    speedup = expected_speedup(costs, agreement, gamma)
    return Plan(activation, names, gamma, agreement, speedup, more_bytes)


def expected_speedup(costs: StepCosts, agreement: float, gamma: int) -> float:
    """Tokens a second of one request with gamma drafts a cycle, over those without."""
    plain = costs.verify_step(1, 1, KEYS)
    drafts = gamma * costs.draft_step(1, KEYS) if gamma else 0.0
    cycle = drafts + costs.verify_step(1, gamma + 1, KEYS * (gamma + 1))
    return expected_tokens(agreement, gamma) * plain / cycle


def _held_out(text: CalibrationText) -> list[Script]:
    """Answers that were not fitted."""
    scripts = []
    for rows in text.spans():
        if rows.start >= text.num_fitted:
            given = int((~text.is_answer[rows]).sum()) + 1
            tokens = tuple(text.tokens[rows].tolist())
            scripts.append(Script(tokens[:given], tokens[given:]))
    return scripts


def _costs(llm: LLM, activations: Sequence[Activation]) -> dict[Activation, StepCosts]:
    """Costs of drafts with each kind of activations, measured in turn; the least of all rounds.

    Other work on the machine only ever adds to a measurement. Verify steps are the same for all.
    """
    tokens = min(COST_TOKENS, llm.cache_tokens)
    ops = llm.decoder.ops
    kv = allocate(llm.model_config, blocks_for(tokens), llm.decoder.dtype, ops.device)
    runner = Runner(llm.decoder, kv)
    rounds = [
        {a: measure_costs(runner, llm.tokenizer, draft_view(a), 1, SECONDS) for a in activations}
        for _ in range(ROUNDS)
    ]
    return {
        a: least_costs(
            [one[a] for one in rounds], [costs for one in rounds for costs in one.values()]
        )
        for a in activations
    }


def least_costs(drafts: Sequence[StepCosts], every: Sequence[StepCosts]) -> StepCosts:
    """The least of several measurements of one batch size.

    Args:
        drafts: those whose draft steps count.
        every: those whose verify steps count; on a machine that falters one may have timed fewer
            gammas than another, and those that all have timed are kept.
    """
    gammas = tuple(sorted(set.intersection(*(set(costs.gammas) for costs in every))))
    tables = [dict(zip(costs.gammas, costs.verify[0], strict=True)) for costs in every]
    return StepCosts(
        batches=drafts[0].batches,
        gammas=gammas,
        draft=tuple(map(min, zip(*(costs.draft for costs in drafts), strict=True))),
        verify=(tuple(min(table[gamma] for table in tables) for gamma in gammas),),
        draft_per_key=min(costs.draft_per_key for costs in drafts),
        verify_per_key=min(costs.verify_per_key for costs in every),
    )


def _agreement(
    llm: LLM, scripts: Sequence[Script], activations: Sequence[Activation]
) -> dict[Activation, float]:
    """Share of positions where a draft with these activations picks the verify view's token."""
    runners = {"verify": runner_for(llm.decoder, scripts, MAX_BATCH)}
    drafts = {activation.value: draft_view(activation) for activation in activations}
    hits, total = dict.fromkeys(activations, 0), 0
    for step in read_along(runners, scripts, llm.tokenizer, drafts=drafts, max_batch=MAX_BATCH):
        wanted = step.logits["verify"].argmax(-1)
        total += len(wanted)
        for activation in activations:
            hits[activation] += int((step.logits[activation.value].argmax(-1) == wanted).sum())
    return {activation: count / max(total, 1) for activation, count in hits.items()}


@contextlib.contextmanager
def _variant(path: Path, bits: Mapping[str, int]) -> Iterator[Path]:
    """A directory with the same files and another index, for as long as it is measured."""
    with tempfile.TemporaryDirectory(prefix="qspec-plan-") as name:
        variant = Path(name)
        for file in path.iterdir():
            if file.name != INDEX_NAME:
                (variant / file.name).symlink_to(file.resolve())
        index = _index(path)
        _set_bits(index, bits)
        _write(variant / INDEX_NAME, index)
        yield variant


def _index(path: Path) -> dict[str, Any]:
    index: dict[str, Any] = read_json(path / INDEX_NAME)
    return index


def _set_bits(index: dict[str, Any], bits: Mapping[str, int]) -> None:
    for name, number in bits.items():
        index["tensors"][name]["draft_bits"] = number


def _write(file: Path, index: Mapping[str, Any]) -> None:
    """Replace an index in one go."""
    new = file.with_suffix(".new")
    try:
        new.write_text(json.dumps(index, indent=1), encoding="utf-8")
        new.replace(file)
    except OSError as error:
        raise QSpecError(f"{file} cannot be written: {error.strerror}") from None
