"""Bad input: one sentence on stderr, nothing on stdout, exit status 2, no traceback."""

import json

import pytest
import torch
from safetensors.torch import save_file

from qspec_llm.cli import main


def refuse(capsys, *argv):
    """Run a command that must be refused; returns the sentence."""
    try:
        status = main([str(arg) for arg in argv])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("qspec")
    return captured.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gamma", "99"], "gamma is 99; it must be between 0 and 16"),
        (["--gamma", "-1"], "gamma is -1"),
        (["--gamma", "two"], "'two'"),
        (["--group", "48"], "group is 48; it must be one of (32, 64, 128)"),
        (["--target", "int3"], "'int3'"),
        (["--draft", "a2"], "'a2'"),
        (["--backend", "tpu"], "'tpu'"),
        (["--backend", "reference", "--isa", "avx2"], "'avx2'"),
        (["--threads", "0"], "threads is 0"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--max-batch", "0"], "max_batch is 0"),
        (["--max-tokens-in-kv", "0"], "max_tokens_in_kv is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-p", "0"], "top_p is 0"),
        (["--top-k", "-1"], "top_k is -1"),
        (["--min-p", "2"], "min_p is 2"),
        (["--bogus", "1"], "--bogus"),
    ],
)
def test_a_bad_option(model_dir, capsys, options, words):
    assert words in refuse(capsys, "generate", model_dir, "--prompt", "hi", *options)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "holds no prompts"),
        ("nope\n", "line 1 of"),
        ('{"prompt": "a"}\n{"prompt": 3}\n', "line 2 of"),
        ('{"prompt": "a", "promt": "b"}\n', "'promt'"),
        ('{"prompt": " "}\n', "empty"),
    ],
)
def test_a_bad_prompt_file(model_dir, capsys, tmp_path, lines, words):
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines, encoding="utf-8")
    assert words in refuse(capsys, "generate", model_dir, "--prompt-file", file)


def test_a_missing_prompt_file(model_dir, capsys, tmp_path):
    file = tmp_path / "none.jsonl"
    assert "none.jsonl" in refuse(capsys, "generate", model_dir, "--prompt-file", file)


def test_an_empty_prompt(model_dir, capsys):
    assert "empty" in refuse(capsys, "generate", model_dir, "--prompt", "")


def test_a_prompt_longer_than_the_context_names_both_numbers(model_dir, capsys):
    words = refuse(capsys, "generate", model_dir, "--prompt", "x" * 300, "--raw")
    assert "300" in words
    assert "256" in words


def test_a_prompt_longer_than_the_cache_names_both_numbers(model_dir, capsys):
    options = ("--prompt", "x" * 50, "--raw", "--max-tokens-in-kv", "32")
    words = refuse(capsys, "generate", model_dir, *options)
    assert "50" in words
    assert "32" in words


def test_a_small_cache_still_answers(model_dir, capsys):
    options = ["--prompt", "hi", "--raw", "--max-tokens-in-kv", "20", "--max-tokens", "64"]
    assert main(["generate", str(model_dir), *options]) == 0


def test_a_missing_model(capsys):
    assert "no-such-model" in refuse(capsys, "generate", "no-such-model", "--prompt", "hi")


def test_a_pickled_model(capsys, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "pickled" in refuse(capsys, "inspect", tmp_path)
    assert "pickled" in refuse(capsys, "inspect", tmp_path / "pytorch_model.bin")


def test_an_unsupported_architecture(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPTBigCode"]}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "'GPTBigCode'" in refuse(capsys, "inspect", tmp_path)


def test_a_corrupt_model(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "model.safetensors" in refuse(capsys, "inspect", tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\x00" * 9)
    assert "model.gguf" in refuse(capsys, "inspect", tmp_path / "model.gguf")


def test_no_command(capsys):
    assert "COMMAND" in refuse(capsys)
