"""`qspec eval` on a tiny model: what must hold whatever the weights are."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from helpers_weights import refused
from qspec_llm.cli import main
from qspec_llm.engine.params import SamplingParams
from qspec_llm.eval.acceptance import decode_watched
from qspec_llm.eval.evaluate import (
    answer_prompts,
    evaluate_answers,
    evaluate_text,
    load_reference,
    windows,
)
from qspec_llm.eval.fidelity import compare
from qspec_llm.eval.prompts import EvalPrompt, read_prompts
from qspec_llm.llm import LLM
from qspec_llm.weights.view import Activation, draft_view

Load = Callable[..., LLM]
DRAFTS = {name: draft_view(Activation(name)) for name in ("a16", "a8", "a4")}
TEXT = list(b"the quick brown fox jumps over the lazy dog; ") * 3


def track(values: Iterable[Any], total: int, text: str) -> Iterable[Any]:
    return values


def read_text(llm: LLM) -> dict[str, Any]:
    scripts = windows(TEXT, 50)
    return evaluate_text(llm, load_reference(llm), scripts, DRAFTS, max_batch=4, track=track)


def test_windows_cover_a_text() -> None:
    scripts = windows(range(101), 50)
    assert [script.num_tokens for script in scripts] == [50, 50]  # one token alone scores nothing
    assert scripts[1].prompt == (50,)
    with refused("two tokens"):
        windows([1], 50)


def test_a_bf16_target_is_its_own_reference(load: Load) -> None:
    figures = read_text(load("bf16"))
    assert figures["verify"]["kl_mean"] == 0
    assert figures["verify"]["agreement"] == 1
    assert figures["a4"]["kl_mean"] > figures["a16"]["kl_mean"] > 0


def test_an_int4_target_diverges_from_the_original(load: Load) -> None:
    llm = load("int4")
    figures = read_text(llm)
    assert figures["reference"]["kl_mean"] == 0
    assert figures["verify"]["kl_mean"] > 1e-4
    bf16 = read_text(load("bf16"))["verify"]
    assert figures["reference"]["perplexity"] == pytest.approx(bf16["perplexity"], rel=1e-9)


def test_another_models_weights_are_no_reference(load: Load, tmp_path: Path) -> None:
    from helpers_model_dir import write_model

    write_model(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 1}))
    with refused("num_layers", "original"):
        load_reference(load("int4"), tmp_path)


@pytest.mark.parametrize("target", ["int4", "bf16"])
def test_answers_agree_and_are_plain_decodings(load: Load, target: str) -> None:
    llm = load(target)
    prompts = [llm.encode(text) for text in ("one", "two words", "and a third one")]
    answers = answer_prompts(llm, prompts, max_tokens=12, gamma=3, track=track)
    assert answers.is_identical
    kinds = ["chat", "code", "chat"]
    figures = evaluate_answers(
        llm, load_reference(llm), answers, kinds, DRAFTS, max_batch=2, track=track
    )
    assert set(figures) == {"chat", "code", "all"}
    assert figures["all"]["verify"]["agreement"] == 1
    for name in DRAFTS:
        parts = [figures[kind][name] for kind in ("chat", "code")]
        whole = sum(part["agreement"] * part["tokens"] for part in parts)
        assert figures["all"][name]["agreement"] * figures["all"][name]["tokens"] == (
            pytest.approx(whole)
        )


def test_acceptance_adds_up_to_the_engines_own_counts(load: Load) -> None:
    llm = load("bf16")
    prompts = [llm.encode(text) for text in ("a", "bb", "ccc")]
    requests, counts = decode_watched(
        llm, llm.new_engine(4), prompts, SamplingParams(max_tokens=20, temperature=0)
    )
    assert sum(counts.tested.values()) == sum(r.num_tested for r in requests)
    assert sum(counts.accepted.values()) == sum(r.num_accepted for r in requests)
    assert list(counts.tested) == sorted(counts.tested)
    tested = list(counts.tested.values())
    assert tested == sorted(tested, reverse=True)
    for position, number in counts.tested.items():
        if position > 1:
            assert number <= counts.accepted[position - 1]


@pytest.mark.parametrize("draft", ["a4", "a8"])
def test_qspec_answers_as_its_target_does(load: Load, draft: str) -> None:
    llm = load("int4", draft)
    prompts = [
        EvalPrompt("arithmetic", "2 + 2?", "4"),
        EvalPrompt("chat", "hello"),
        EvalPrompt("code", "f", None, ("assert True",)),
    ]
    figures = compare(
        llm,
        load_reference(llm),
        prompts,
        gamma=3,
        max_tokens=16,
        max_batch=2,
        can_execute=False,
        track=track,
    )
    assert figures["identical"]
    alone, qspec = f"W4{draft.upper()}", f"QSpec (W4{draft.upper()} -> W4A16)"
    assert list(figures["systems"]) == ["W16", "W4A16", alone, qspec]
    assert figures["systems"][qspec]["same_answers"] == 1
    assert figures["systems"][alone]["same_answers"] < 1
    assert figures["systems"]["W16"]["kl_mean"] == 0
    assert figures["systems"][alone]["kl_mean"] > figures["systems"]["W4A16"]["kl_mean"] > 0
    for row in figures["systems"].values():
        assert row["accuracy"]["arithmetic"][1] == 1
        assert "code" not in row["accuracy"]  # was not asked to run it


@pytest.mark.weights
def test_qspec_answers_arithmetic_as_w4a16_does() -> None:
    """The paper's claim on a real model: a W4A4 draft changes nothing."""
    llm = LLM("smollm2", target="int4", draft="a4", gamma=3, max_batch=4)
    prompts = [p for p in read_prompts("builtin") if p.kind != "chat"][:4]
    figures = compare(
        llm,
        load_reference(llm),
        prompts,
        gamma=3,
        max_tokens=24,
        max_batch=4,
        can_execute=False,
        track=track,
    )
    assert figures["identical"]
    rows = figures["systems"]
    assert rows["W4A4"]["same_prefix"] < 0.9
    assert rows["W4A4"]["kl_mean"] > 10 * rows["W4A16"]["kl_mean"]


def run_cli(model_dir: Path, *options: str) -> int:
    return main(["eval", str(model_dir), "--max-tokens", "8", "--limit", "3", *options])


def test_the_command_writes_what_it_prints(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("some text to read " * 4)
    options = ("--target", "int4", "--text", str(text), "-o", str(tmp_path / "out"), "--plot")
    assert run_cli(model_dir, *options, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    files = {Path(path).name for path in report.pop("plots")}
    assert files == {f"{n}.{kind}" for n in ("acceptance", "agreement") for kind in ("png", "svg")}
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in files)
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == report
    assert report["answers"]["identical"]
    assert set(report["text"]["views"]) == {"a16", "a8", "a4", "verify", "reference"}


def test_the_command_prints_tables(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(model_dir, "--text", "none", "--views", "a8") == 0
    assert "identical to plain decoding" in capsys.readouterr().out
    assert run_cli(model_dir, "--fidelity", "--target", "int4", "--draft", "a4") == 0
    out = capsys.readouterr().out
    assert "QSpec (W4A4 -> W4A16)" in out
    assert "token for token" in out


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--plot",), "-o DIR"),
        (("--gamma", "auto"), "number"),
        (("--limit", "0"), "limit is 0"),
        (("--window", "1"), "window is 1"),
        (("--fidelity", "--prompts", "none"), "--prompts none"),
        (("--prompts", "/nowhere"), "/nowhere"),
    ],
)
def test_the_command_refuses(
    model_dir: Path, options: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(model_dir, "--text", "none", *options) == 2
    error = capsys.readouterr().err
    assert word in error
    assert error.count("\n") == 1


def test_a_reference_has_the_adapter_that_the_model_has(model_dir: Path, tmp_path: Path) -> None:
    """With --lora, "the original" is the original with that adapter."""
    import torch
    from safetensors.torch import save_file

    module = "base_model.model.model.layers.0.mlp.up_proj"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"{module}.lora_A.weight": torch.randn(2, 64),
        f"{module}.lora_B.weight": torch.randn(96, 2),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapted = LLM(model_dir, target="int8", lora=tmp_path, max_tokens_in_kv=4096)
    plain = LLM(model_dir, target="int8", max_tokens_in_kv=4096)
    figures = [read_text(llm) for llm in (adapted, plain)]
    assert figures[0]["reference"]["perplexity"] != figures[1]["reference"]["perplexity"]
    assert figures[0]["verify"]["kl_mean"] < 0.05
    crossed = evaluate_text(
        plain, load_reference(adapted), windows(TEXT, 50), {}, max_batch=4, track=track
    )
    assert crossed["verify"]["kl_mean"] > 10 * figures[0]["verify"]["kl_mean"]
