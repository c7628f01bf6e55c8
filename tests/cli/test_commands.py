"""`inspect`, `chat` and `collect-env`."""

import json

import pytest

from qspec_llm.cli import main
from qspec_llm.kernels import available_backends


def test_inspect_counts_every_byte(model_dir, capsys):
    assert main(["inspect", str(model_dir), "--target", "bf16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    tensors = report["tensors"]
    assert report["bytes"]["weights"] == sum(tensor["nbytes"] for tensor in tensors)
    (up,) = (t for t in tensors if t["name"] == "model.layers.1.mlp.up_proj.weight")
    assert up["planes"] == "signed q4+r4+r8"
    assert up["nbytes"] == 96 * 64 * 16.5 / 8
    assert up["draft_nbytes"] == 96 * 64 * 4.5 / 8


def test_inspect_folds_layers_and_names_what_is_dense(model_dir, capsys):
    assert main(["inspect", str(model_dir)]) == 0
    out = capsys.readouterr().out
    assert "layers.*.mlp.up_proj x2" in out
    assert "dense: a vector" in out
    assert main(["inspect", str(model_dir), "--all"]) == 0
    assert "layers.1.mlp.up_proj " in capsys.readouterr().out


def test_chat_answers_resets_and_leaves(model_dir, capsys, monkeypatch):
    lines = iter(["hello", "", "/help", "/reset", "again", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", str(model_dir), "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.count("[4 tokens") == 2


def test_chat_says_when_the_conversation_is_too_long(model_dir, capsys, monkeypatch):
    lines = iter(["x" * 300, "hi"])

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", str(model_dir), "--max-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "256" in out
    assert "[4 tokens" in out


def test_collect_env(capsys):
    assert main(["collect-env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"] == list(available_backends())
    assert report["isa"]
    assert report["packages"]["torch"].startswith("2.")
    assert main(["collect-env"]) == 0
    assert "cpu:" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
