"""`qspec bench steps`: what is timed, what follows from it, and two versions that take turns."""

import io
import json
import re
import shlex
import sys

import pytest
import torch

from helpers_model_dir import write_model
from qspec_llm.bench import steps, turns
from qspec_llm.bench.steps import StepCase, Steps, best_gamma, summarise
from qspec_llm.cli import bench_steps, main
from qspec_llm.engine.captured import rows_after
from qspec_llm.errors import QSpecError
from qspec_llm.kernels import get_backend
from qspec_llm.model.config import read_config
from qspec_llm.model.load import load_decoder
from qspec_llm.weights.checkpoint import open_checkpoint
from qspec_llm.weights.quantize import Recipe, Target
from qspec_llm.weights.view import VERIFY, Activation, draft_view

DRAFT = draft_view(Activation.A8)
THIS = f"{shlex.quote(sys.executable)} -m qspec_llm"
OPTIONS = ["--backend", "reference", "--rounds", "1", "--contexts", "20", "--targets", "int4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_model(path)
    return path


@pytest.fixture
def ready(model):
    checkpoint = open_checkpoint(model)
    config = read_config(checkpoint)
    recipe = Recipe(Target.INT4, 32)
    decoder = load_decoder(checkpoint, config, recipe, get_backend("reference"), num_positions=64)
    return Steps({"int4": decoder}, Activation.A8, [1, 2], [20], [1, 3])


@pytest.mark.parametrize("is_apart", [False, True])
def test_rows_of_several_sequences(is_apart):
    rows = rows_after(20, 2, 3, is_apart=is_apart)
    assert rows.positions.tolist() == [20, 21] * 3
    assert rows.contexts.tolist() == [22] * 3
    first = [0, 32, 64] if is_apart else [0, 0, 0]
    assert rows.slots.tolist() == [at + place for at in first for place in (20, 21)]
    assert rows.block_tables.tolist() == [[at // 16, at // 16 + 1] for at in first]
    assert rows.cu_rows.tolist() == [0, 2, 4, 6]


def test_every_sequence_of_a_step_has_its_own_keys(ready):
    """A batch computes what its sequences compute alone, and they do not see the same cache."""
    alone, batch = (ready._forward(case) for case in ready.cases if case.rows == 2)
    logits = batch().view(3, 2, -1)
    torch.testing.assert_close(logits[0], alone(), rtol=0, atol=0)
    assert not torch.equal(logits[0], logits[1])
    assert len(set(ready.bits())) == len(ready.cases)
    assert ready.bits() == ready.bits()


def test_all_steps_are_timed(ready):
    assert [(case.view, case.rows, case.batch) for case in ready.cases] == [
        (view, rows, batch)
        for batch in (1, 3)
        for view, rows in ((DRAFT, 1), (VERIFY, 1), (VERIFY, 2))
    ]
    seconds = ready.seconds(1)
    assert list(seconds) == ready.cases
    assert all(value > 0 for value in seconds.values())
    assert len(ready.round()) == len(ready.cases)


def test_what_costs_imply():
    def cost(view, rows, batch):
        return (0.3 if view.is_draft else 1 + 0.1 * (rows - 1)) * batch

    cases = [
        StepCase("bf16", view, rows, context, batch)
        for view, rows in ((DRAFT, 1), (VERIFY, 1), (VERIFY, 3))
        for context in (100, 900)
        for batch in (1, 4)
    ]
    seconds = {case: cost(case.view, case.rows, case.batch) for case in cases}
    found = summarise(seconds, Activation.A8)
    assert [(one["target"], one["batch"], one["context"]) for one in found] == [
        ("bf16", 1, 100),
        ("bf16", 4, 100),
    ]
    for one in found:
        assert one["c"] == pytest.approx(0.3)
        assert one["v"] == pytest.approx({1: 1.0, 3: 1.2})
        gamma, speedup = best_gamma(0.9, one["c"], one["v"])
        assert (gamma, speedup) == (2, pytest.approx((1 + 0.9 + 0.81) / (2 * 0.3 + 1.2)))
        assert one["implied"]["0.9"] == {"gamma": gamma, "speedup": speedup}


def test_the_other_side_of_taking_turns(ready):
    answers = io.StringIO()
    turns.answer_turns(ready, ["round\n", "\n", "round\n"], answers)
    first, *rounds = map(json.loads, answers.getvalue().splitlines())
    assert [case["rows"] for case in first["cases"]] == [case.rows for case in ready.cases]
    assert first["bits"] == ready.bits()
    assert [len(seconds) for seconds in rounds] == [len(ready.cases)] * 2


def other(script, ready):
    """What `compare` says of another version that is this script."""
    with turns.Other(f"{shlex.quote(sys.executable)} -c {shlex.quote(script)}", []) as one:
        return turns.compare(ready, one, rounds=3)


def says(ready, *, bits, seconds, cases=None):
    first = {"cases": cases or turns._names(ready.cases), "bits": bits}
    return (
        f"print('''{json.dumps(first)}''', flush=True)\nwhile input(): print({seconds}, flush=True)"
    )


def test_medians_ratios_and_bits(ready, monkeypatch):
    count = len(ready.cases)
    ours = iter([9.0, 9.0, 1.0, 3.0, 2.0, 2.0, 1.0, 3.0])  # a warm-up, then three rounds
    monkeypatch.setattr(ready, "round", lambda: [next(ours)] * count)
    bits = ready.bits()
    script = says(ready, bits=["other", *bits[1:]], seconds=[4.0] * count)
    found = other(
        f"import contextlib\nwith contextlib.suppress(EOFError):\n exec({script!r})", ready
    )
    assert list(found) == ready.cases
    assert [one.has_same_bits for one in found.values()] == [False] + [True] * (count - 1)
    for one in found.values():
        assert (one.seconds, one.other_seconds, one.ratio) == (2.0, 4.0, 0.5)
        assert one.aa_ratio == 3.0


def test_another_version_may_know_less_of_a_view_but_not_of_a_step(ready):
    older = turns._names(ready.cases)
    for case in older:
        del case["view"]["group"]
    script = says(ready, bits=ready.bits(), seconds=[1.0] * len(older), cases=older)
    ends = "import contextlib\nwith contextlib.suppress(EOFError):\n exec({script!r})"
    assert all(one.has_same_bits for one in other(ends.format(script=script), ready).values())
    del older[0]["rows"]
    script = says(ready, bits=ready.bits(), seconds=[1.0], cases=older)
    with pytest.raises(QSpecError, match="measures other steps"):
        other(script, ready)


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("raise SystemExit(3)", "has ended with status 3"),
        ("print('{}')", "measures other steps"),
        ("print('hello')", r"said 'hello\n' instead of JSON"),
    ],
)
def test_another_version_that_cannot_take_turns(script, sentence, ready):
    with pytest.raises(QSpecError, match=re.escape(sentence)):
        other(script, ready)


def test_another_version_that_ends_between_turns(ready):
    script = says(ready, bits=ready.bits(), seconds=[1.0]).replace("while input()", "if input()")
    with pytest.raises(QSpecError, match="has ended with status 0"):
        other(script.replace("[1.0]", str([1.0] * len(ready.cases))), ready)


@pytest.mark.parametrize("command", ["no-such-program", "", "'"])
def test_another_version_that_does_not_start(command):
    with pytest.raises(QSpecError, match="cannot start the other version"):
        turns.Other(command, [])


def test_the_command_against_itself(model, capsys):
    options = [str(model), *OPTIONS, "--rows", "1", "--batches", "1", "2"]
    assert main(["bench", "steps", *options, "--against", THIS, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["against"] == THIS
    assert [(one["view"], one["batch"]) for one in report["steps"]] == [
        ("draft", 1),
        ("verify", 1),
        ("draft", 2),
        ("verify", 2),
    ]
    assert all(one["has_same_bits"] for one in report["steps"])
    assert all(one["ratio"] == one["seconds"] / one["other_seconds"] for one in report["steps"])
    bench_steps._show_in_turn(report)
    lines = capsys.readouterr().out.splitlines()
    assert f"in turn with {THIS}" in lines[1]
    assert sum("same bits" in line for line in lines) == 4


def test_the_command_alone(model, capsys, monkeypatch):
    monkeypatch.setattr(steps, "host_share", lambda *_, **__: 0.25)
    options = [str(model), *OPTIONS, "--rows", "1", "2", "--batches", "1", "2"]
    assert main(["bench", "steps", *options]) == 0
    out = capsys.readouterr().out
    assert out.count("batch   2  rows  2  context    20") == 1
    assert "int4, batch 2: c = " in out
    assert "outside kernels: 25.0% of a plain step" in out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rows", "2", "3"], "1, a plain step, must be among them"),
        (["--batches", "0"], "--batches 0: give numbers from 1 on"),
        (["--contexts", "20", "-1"], "--contexts -1: give numbers from 1 on"),
        (["--rounds", "0"], "--rounds 0: give numbers from 1 on"),
        (["--contexts", "4000"], "context 4000 is too long"),
        (["--shape", "llama-3-8b"], "give either a MODEL or --shape"),
    ],
)
def test_what_cannot_be_measured(options, sentence, model, capsys):
    assert main(["bench", "steps", str(model), *OPTIONS, *options]) == 2
    assert sentence in capsys.readouterr().err
