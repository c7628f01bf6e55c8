"""`qspec quantize` and `qspec plan`, as a user runs them."""

import json
from pathlib import Path
from typing import Any

import pytest

from qspec_llm.cli import main
from qspec_llm.engine.costs import StepCosts
from qspec_llm.quantize import plan

CHEAP_DRAFT = StepCosts((1,), (0, 4), (0.1,), ((1.0, 1.1),), 0.0, 0.0)


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans come out the same on every machine."""
    monkeypatch.setattr(plan, "measure_costs", lambda *_: CHEAP_DRAFT)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "c.jsonl"
    lines = [
        {"prompt": f"Count to {n}.", "answer": " ".join(map(str, range(n)))} for n in range(3, 14)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def quantize(model: Path, path: Path, text: str, capsys: Any, *more: str) -> dict[str, Any]:
    args = ["quantize", str(model), "-o", str(path), "--calibration", text, "--json", *more]
    assert main(args) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def generate(model: Path, capsys: Any, *more: str) -> dict[str, Any]:
    assert (
        main(["generate", str(model), "--prompt", "Hello", "--max-tokens", "24", "--json", *more])
        == 0
    )
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_quantised_bf16_model_writes_the_original_text(model_dir, tmp_path, text, capsys, method):
    report = quantize(
        model_dir, tmp_path / "q", text, capsys, "--target", "bf16", "--method", method
    )
    assert report["method"] == method
    assert {layer["name"] for layer in report["layers"]} == {"layer 0", "layer 1", "vocabulary"}
    plain = generate(model_dir, capsys, "--target", "bf16", "--gamma", "0")
    drafted = generate(tmp_path / "q", capsys)
    assert drafted["gamma"] == report["plan"]["gamma"] > 0
    assert drafted["draft"] == report["plan"]["draft"]
    assert drafted["results"][0]["token_ids"] == plain["results"][0]["token_ids"]


def test_the_table_and_the_plan_are_shown(model_dir, tmp_path, text, capsys):
    path = str(tmp_path / "q")
    args = ["quantize", str(model_dir), "-o", path, "--target", "int8", "--method", "rtn"]
    assert main([*args, "--calibration", text]) == 0
    out = capsys.readouterr().out
    assert "down" in out
    assert "of held-out answers" in out
    assert "expected for one request here" in out
    assert main(["inspect", path]) == 0
    out = capsys.readouterr().out
    assert "made: method rtn, group 32" in out
    assert "plan: draft a16, eight_bits" in out  # bytes cost nothing here


@pytest.mark.parametrize("more", [[], ["--method", "awq"], ["--asymmetric"]], ids=str)
def test_a_model_with_outlier_columns_is_run_and_shown(model_dir, tmp_path, text, capsys, more):
    report = quantize(
        model_dir, tmp_path / "q", text, capsys, "--target", "int4", "--outliers", "32", *more
    )
    assert report["outliers"] == 32
    texts = [generate(tmp_path / "q", capsys, "--draft", "a4", "--gamma", g) for g in ("0", "3")]
    assert texts[0]["results"][0]["token_ids"] == texts[1]["results"][0]["token_ids"]
    assert main(["inspect", str(tmp_path / "q")]) == 0
    out = capsys.readouterr().out
    assert "a4 drafts see the first 32 columns of the inputs of q, k, v, gate, up and down" in out
    assert "outliers 32" in out


@pytest.mark.parametrize(("bits", "share"), [("4", 0.54), ("8", 1.0)])
def test_draft_bits_are_what_was_asked(model_dir, tmp_path, text, capsys, bits, share):
    quantize(model_dir, tmp_path / "q", text, capsys, "--target", "int8", "--method", "rtn",
             "--draft-bits", bits)  # fmt: skip
    assert main(["inspect", str(tmp_path / "q"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["plan"] == {}
    assert report["bytes"]["read_by_draft"] / report["bytes"]["weights"] == pytest.approx(
        share, abs=0.05
    )


def test_a_plan_can_be_made_again(model_dir, tmp_path, text, capsys):
    quantize(model_dir, tmp_path / "q", text, capsys, "--target", "bf16", "--draft-bits", "4")
    pytest.importorskip("matplotlib")
    args = ["--calibration", text, "--json", "--plot", str(tmp_path / "plots")]
    assert main(["plan", str(tmp_path / "q"), *args]) == 0
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {"plan.png", "plan.svg"}
    again = json.loads(capsys.readouterr().out)
    assert (
        json.loads((tmp_path / "q" / "qspec.json").read_text())["plan"]["gamma"] == again["gamma"]
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target", "int8"], "method 'gptq' has nothing to choose for target 'int8'"),
        (["--group", "48"], "group is 48; it must be one of (32, 64, 128)"),
        (["--calibration", "nowhere.jsonl"], "the calibration text nowhere.jsonl cannot be read"),
        (["--calibration-tokens", "5"], "gives 0 sequences within 5 tokens"),
        (["--outliers", "32"], "target 'bf16' cannot be reordered"),
        (["--target", "int4", "--outliers", "48"], "outliers is 48; it must be a multiple of 32"),
        (["--target", "int4", "--outliers", "0"], "outliers is 0; it must be a multiple of 32"),
        (["--target", "int4", "--outliers", "96"], "a multiple of 32 up to 64"),
        (
            ["--target", "int4", "--outliers", "32", "--rotate"],
            "--rotate leaves no outliers to keep; take it or --outliers",
        ),
        (["--calibration-tokens", "0"], "calibration_tokens is 0; it must be at least 1"),
    ],
)
def test_errors_are_one_sentence_and_leave_nothing(model_dir, tmp_path, capsys, more, message):
    assert main(["quantize", str(model_dir), "-o", str(tmp_path / "q"), *more]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_plan_needs_a_nested_checkpoint(model_dir, capsys):
    assert main(["plan", str(model_dir)]) == 2
    assert "is no nested checkpoint; `qspec quantize` writes one" in capsys.readouterr().err
