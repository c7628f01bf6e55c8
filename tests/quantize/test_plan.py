"""Plans: what is measured is what it says, and the best is chosen."""

import json
from pathlib import Path

import pytest
import torch

from qspec_llm.engine.costs import StepCosts
from qspec_llm.eval.forced import Script, read_along, runner_for
from qspec_llm.llm import LLM
from qspec_llm.model.config import read_config
from qspec_llm.quantize import plan as planning
from qspec_llm.quantize.driver import Options, quantize
from qspec_llm.quantize.matrices import Method
from qspec_llm.quantize.plan import choose, expected_speedup, make_plan, set_draft_bits
from qspec_llm.quantize.sensitivity import Unit, measure
from qspec_llm.quantize.text import CalibrationText, Sample, encode
from qspec_llm.tokenizer import HFTokenizer
from qspec_llm.weights.checkpoint import open_checkpoint
from qspec_llm.weights.quantize import Target
from qspec_llm.weights.view import Activation, draft_view

A8, A16 = Activation.A8, Activation.A16
LINES = [f"{word} and {word} again, for the {n}th time" for n, word in enumerate("abcdefgh")]


@pytest.fixture(scope="module")
def text(model: Path) -> CalibrationText:
    return encode([Sample(f"Say {line[0]}.", line) for line in LINES], HFTokenizer(model), 5000)


def nested(model: Path, path: Path, text: CalibrationText, target: str) -> Path:
    how = Options(target=Target(target), method=Method.RTN, group=32)
    quantize(open_checkpoint(model), path, how, text, write_more=HFTokenizer(model).save)
    return path


def costs(draft: float, *, per_row: float = 0.02) -> StepCosts:
    verify = tuple(1.0 + per_row * gamma for gamma in range(9))
    return StepCosts((1,), tuple(range(9)), (draft,), (verify,), 0.0, 0.0)


def costs_by_bytes(runner, tokenizer, view, max_batch, seconds) -> StepCosts:
    return costs(runner.decoder.draft_bytes / 1e6)


def unit(name: str, at4: float, at8: float, more_bytes: int = 100) -> Unit:
    return Unit((name,), {(4, a): at4 for a in (A8, A16)} | {(8, a): at8 for a in (A8, A16)},
                more_bytes)  # fmt: skip


def four_bits_only(name: str, divergence: float) -> Unit:
    return Unit((name,), {(4, A8): divergence, (4, A16): divergence}, 0)


def measured(draft4: float, agree4: float, draft8: float, agree8: float) -> dict:
    table = {}
    for activation in (A8, A16):
        slow = 1.0 if activation is A8 else 1.5
        table[4, activation] = planning._Measured(costs(slow * draft4), agree4)
        table[8, activation] = planning._Measured(costs(slow * draft8), agree8)
    return table


def test_the_expected_speed_up_is_tokens_over_seconds() -> None:
    found = expected_speedup(costs(0.25, per_row=0.0), 0.8, 2)
    assert found == pytest.approx((1 + 0.8 + 0.64) / (2 * 0.25 + 1))
    assert expected_speedup(costs(0.25), 0.8, 0) == 1


def test_a_unit_that_matters_gets_eight_bits() -> None:
    units = [unit("much", 0.3, 0.0), unit("little", 0.001, 0.0), unit("none", 0.0, 0.0)]
    plan = choose(units, measured(0.3, 0.6, 0.6, 0.95)).plan
    assert plan.eight_bits == ("much",)
    assert plan.draft is A8
    assert plan.gamma > 0
    assert 0.9 < plan.agreement < 0.95


def test_nothing_is_read_twice_for_little() -> None:
    units = [unit("a", 0.01, 0.009), unit("b", 0.01, 0.009)]
    assert choose(units, measured(0.3, 0.9, 0.6, 0.91)).plan.eight_bits == ()


def test_bytes_count() -> None:
    units = [unit("large", 0.1, 0.0, more_bytes=10_000), unit("small", 0.1, 0.0, more_bytes=10)]
    assert choose(units, measured(0.3, 0.7, 0.6, 0.9)).plan.eight_bits == ("small",)


def test_drafts_that_do_not_pay_are_not_planned() -> None:
    plan = choose([four_bits_only("a", 1.0)], {
        (4, a): planning._Measured(costs(1.0), 0.5) for a in (A8, A16)
    }).plan  # fmt: skip
    assert plan.gamma == 0
    assert plan.speedup == 1


def test_dear_activations_pay_only_for_agreement() -> None:
    table = measured(0.3, 0.7, 0.6, 0.9)
    units = [four_bits_only("a", 1.0)]
    assert choose(units, {key: table[key] for key in table if key[0] == 4}).plan.draft is A8
    table[4, A16] = planning._Measured(costs(0.31), 0.95)
    assert choose(units, {key: table[key] for key in table if key[0] == 4}).plan.draft is A16


def kl_of(path: Path, activation: Activation, scripts: list[Script]) -> float:
    """Measured by the engine: verify view against draft view."""
    llm = LLM(path, draft=activation.value, gamma=0, max_tokens_in_kv=2048, backend="reference")
    runners = {"verify": runner_for(llm.decoder, scripts, 8)}
    drafts = {"draft": draft_view(activation)}
    total, count = 0.0, 0
    for step in read_along(runners, scripts, llm.tokenizer, drafts=drafts, max_batch=8):
        p, q = (step.logits[name].double().log_softmax(-1) for name in ("verify", "draft"))
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    return total / count


@pytest.mark.parametrize("activation", [Activation.A8, Activation.A4, Activation.A16])
def test_divergences_add_up_to_the_measured_one(
    model: Path, tmp_path: Path, text: CalibrationText, activation: Activation
) -> None:
    path = nested(model, tmp_path / "q", text, "int8")
    set_draft_bits(path, 8)  # errors so small that the second order holds
    checkpoint = open_checkpoint(path)
    units = measure(checkpoint, read_config(checkpoint), Target.INT8, text)
    assert [len(u.names) for u in units] == [3, 1, 2, 1] * 2 + [1]
    scripts = [
        Script(tokens[:1], tokens[1:])
        for tokens in (tuple(text.tokens[s].tolist()) for s in text.spans())
    ]
    expected = sum(u.divergence[8, activation] for u in units)
    found = kl_of(path, activation, scripts)
    if activation is Activation.A16:
        assert expected < 1e-6
    else:
        assert expected == pytest.approx(found, rel=0.5)


def test_eight_bits_diverge_less_than_four(
    model: Path, tmp_path: Path, text: CalibrationText
) -> None:
    checkpoint = open_checkpoint(nested(model, tmp_path / "q", text, "int8"))
    for found in measure(checkpoint, read_config(checkpoint), Target.INT8, text):
        assert found.divergence[8, A8] < 0.1 * found.divergence[4, A8]
        assert found.more_bytes > 0


@pytest.mark.parametrize("target", ["bf16", "int8", "int4"])
def test_a_plan_is_stored_and_used(
    model: Path,
    tmp_path: Path,
    text: CalibrationText,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = nested(model, tmp_path / "q", text, target)
    before = json.loads((path / "qspec.json").read_text())
    monkeypatch.setattr(planning, "measure_costs", costs_by_bytes)
    plan = make_plan(path, text).plan
    index = json.loads((path / "qspec.json").read_text())
    assert index["plan"]["gamma"] == plan.gamma
    assert index["plan"]["eight_bits"] == len(plan.eight_bits)
    changed = {
        name
        for name, record in index["tensors"].items()
        if record.get("bits") == 8 and record["draft_bits"] == 8
    }
    changed.discard("model.embed_tokens.weight")  # looked up, never drafted with
    assert changed == set(plan.eight_bits)
    assert {k: v for k, v in index.items() if k not in ("plan", "tensors")} == {
        k: v for k, v in before.items() if k != "tensors"
    }
    llm = LLM(path, max_tokens_in_kv=512)
    assert llm.config.draft is plan.draft
    assert llm.config.gamma == plan.gamma
    assert LLM(path, draft="a4", gamma=3, max_tokens_in_kv=512).config.gamma == 3


def test_noise_is_taken_out_of_costs(
    model: Path, tmp_path: Path, text: CalibrationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each measurement is slow somewhere else; none of it is left."""
    llm = LLM(nested(model, tmp_path / "q", text, "bf16"), max_tokens_in_kv=512)
    calls = iter(range(100))

    def noisy(runner, tokenizer, view, max_batch, seconds) -> StepCosts:
        number = next(calls)
        verify = [1.0 + 0.02 * gamma for gamma in range(9)]
        verify[number % 6] += 0.5
        draft = 0.3 if view.activation is A8 else 0.4
        return StepCosts(
            (1,), tuple(range(9)), (draft + (number < 3) / 2,), (tuple(verify),), 0.0, 0.0
        )

    monkeypatch.setattr(planning, "measure_costs", noisy)
    found = planning._costs(llm, [A8, A16])
    assert found == {A8: costs(0.3), A16: costs(0.4)}


def test_measurements_of_different_gammas_are_merged() -> None:
    """A machine that falters measures fewer gammas than in its other rounds."""
    many = StepCosts((1,), (0, 1, 2, 4), (0.6,), ((1.0, 1.1, 1.2, 1.5),), 1e-4, 2e-4)
    few = StepCosts((1,), (0, 1, 4), (0.5,), ((1.2, 1.3, 1.4),), 2e-4, 1e-4)
    least = planning.least_costs([many], [many, few])
    assert least == StepCosts((1,), (0, 1, 4), (0.6,), ((1.0, 1.1, 1.4),), 1e-4, 1e-4)
    assert planning.least_costs([few], [many, few]).draft == (0.5,)


def test_fixed_bits_are_stored(model: Path, tmp_path: Path, text: CalibrationText) -> None:
    path = nested(model, tmp_path / "q", text, "int8")
    drafted = {bits: LLM(path, max_tokens_in_kv=512).decoder.draft_bytes
               for bits in (8, 4) if set_draft_bits(path, bits) is None}  # fmt: skip
    assert drafted[8] > 1.7 * drafted[4]


@pytest.mark.parametrize("target", ["int8", "int4"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_mixed_planes_change_no_token(
    model: Path, tmp_path: Path, text: CalibrationText, target: str, backend: str
) -> None:
    """Every other 8-bit tensor is drafted at 8 bits: q, k and v are then no longer one matrix."""
    path = nested(model, tmp_path / "q", text, target)
    index = json.loads((path / "qspec.json").read_text())
    eight = [name for name, record in index["tensors"].items() if record.get("bits") == 8]
    for number, name in enumerate(eight):
        index["tensors"][name]["draft_bits"] = 8 if number % 2 else 4
    (path / "qspec.json").write_text(json.dumps(index))
    llm = LLM(path, max_tokens_in_kv=2048, backend=backend)
    from qspec_llm.engine.params import SamplingParams

    params = SamplingParams(max_tokens=24, temperature=0)
    prompts = [llm.encode(line) for line in LINES[:3]]
    plain = llm.generate(prompts, params, gamma=0)
    drafted = llm.generate(prompts, params, gamma=3)
    for one, other in zip(plain, drafted, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
    assert sum(o.outputs[0].speculation.drafted for o in drafted)


def test_sensitivities_are_reproducible(model: Path, tmp_path: Path, text: CalibrationText) -> None:
    checkpoint = open_checkpoint(nested(model, tmp_path / "q", text, "bf16"))
    config = read_config(checkpoint)
    first, again = (measure(checkpoint, config, Target.BF16, text) for _ in range(2))
    assert first == again
    assert torch.is_grad_enabled()
