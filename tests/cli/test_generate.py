"""`qspec generate` as a user meets it: text, JSON, comparison."""

import json

import pytest

from qspec_llm import LLM, SamplingParams
from qspec_llm.cli import main

KEYS = {
    "model", "target", "draft", "gamma", "backend", "bytes", "results", "acceptance_rate",
    "mean_tokens_per_cycle", "seconds", "tokens_per_second", "compare", "steps",
}  # fmt: skip
RESULT_KEYS = {
    "prompt", "text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens",
    "cycles", "drafted", "accepted",
}  # fmt: skip


def run_json(capsys, *argv):
    assert main(["generate", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_exactly_the_documented_keys(model_dir, capsys):
    report = run_json(capsys, model_dir, "--prompt", "hi", "--max-tokens", "9")
    assert report.keys() == KEYS
    assert report["bytes"].keys() == {"weights", "weights_if_stored_once", "kv_per_token"}
    assert report["steps"].keys() == {"draft_seconds", "verify_seconds", "other_seconds"}
    assert report["compare"] is None
    (result,) = report["results"]
    assert result.keys() == RESULT_KEYS
    assert result["completion_tokens"] == len(result["token_ids"]) == 9
    assert result["finish_reason"] == "length"


def test_nothing_is_stored_twice(model_dir, capsys):
    report = run_json(capsys, model_dir, "--prompt", "hi", "--max-tokens", "1")
    assert report["bytes"]["weights"] == report["bytes"]["weights_if_stored_once"]
    assert report["bytes"]["kv_per_token"] == 2 * 2 * 2 * 16 * 2  # K, V; layers; heads; D; bytes


@pytest.mark.parametrize("target", ["int4", "int8", "bf16"])
@pytest.mark.parametrize("draft", ["a8", "a4", "a16"])
def test_compare_finds_every_token_identical(model_dir, capsys, target, draft):
    options = ("--prompt", "hello", "--target", target, "--draft", draft, "--gamma", "3")
    report = run_json(capsys, model_dir, *options, "--compare", "--max-tokens", "24")
    assert report["compare"].keys() == {"identical", "seconds", "tokens_per_second", "speedup"}
    assert report["compare"]["identical"] is True
    assert report["acceptance_rate"] is not None


def test_plain_decoding_drafts_nothing(model_dir, capsys):
    report = run_json(capsys, model_dir, "--prompt", "x", "--gamma", "0", "--max-tokens", "5")
    assert report["acceptance_rate"] is None
    assert report["mean_tokens_per_cycle"] == 1.0
    assert report["results"][0]["drafted"] == 0


@pytest.mark.parametrize(("target", "gamma"), [("int4", 0), ("int8", 0), ("bf16", 2)])
def test_the_default_gamma_is_the_targets_and_plain_decoding_is_announced(
    model_dir, capsys, target, gamma
):
    options = ["generate", str(model_dir), "--prompt", "x", "--target", target, "--json"]
    assert main(options) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["gamma"] == gamma
    assert ("decodes plainly by default" in captured.err) == (gamma == 0)


def test_a_prompt_file_is_one_batch_in_its_order(model_dir, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"prompt": "two, longer"}\n', encoding="utf-8")
    batch = run_json(capsys, model_dir, "--prompt-file", file, "--max-tokens", "12")
    assert [result["prompt"] for result in batch["results"]] == ["one", "two, longer"]
    alone = run_json(capsys, model_dir, "--prompt", "two, longer", "--max-tokens", "12")
    assert batch["results"][1]["token_ids"] == alone["results"][0]["token_ids"]


def test_text_goes_to_stdout_and_figures_to_stderr(model_dir, capsys):
    options = ["generate", str(model_dir), "--prompt", "hi", "--max-tokens", "16", "--compare"]
    assert main(options) == 0
    captured = capsys.readouterr()
    text = run_json(capsys, model_dir, "--prompt", "hi", "--max-tokens", "16")["results"][0]["text"]
    assert captured.out == text + "\n"
    assert "every token is identical to plain decoding" in captured.err


def test_raw_leaves_the_chat_template_out(model_dir, capsys):
    chat = run_json(capsys, model_dir, "--prompt", "hi", "--max-tokens", "1")
    raw = run_json(capsys, model_dir, "--prompt", "hi", "--max-tokens", "1", "--raw")
    assert raw["results"][0]["prompt_tokens"] == len("hi")
    assert chat["results"][0]["prompt_tokens"] == len("<|user|>hi<|assistant|>")


def test_a_seed_fixes_the_text(model_dir, capsys):
    options = (model_dir, "--prompt", "hi", "--temperature", "1", "--max-tokens", "16", "--seed")
    first, again, other = (run_json(capsys, *options, seed) for seed in ("5", "5", "6"))
    assert first["results"] == again["results"]
    assert first["results"][0]["token_ids"] != other["results"][0]["token_ids"]


@pytest.mark.weights
def test_smollm2_answers(capsys):
    options = ("--prompt", "What is the capital of France?", "--max-tokens", "8", "--gamma", "3")
    report = run_json(capsys, "smollm2", *options, "--compare")
    assert "Paris" in report["results"][0]["text"]
    assert report["target"] == "int4"
    assert report["compare"]["identical"] is True
    assert report["bytes"]["weights"] == report["bytes"]["weights_if_stored_once"]


def test_gamma_auto_measures_once_and_answers_as_plain_decoding(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("QSPEC_CACHE", str(tmp_path / "cache"))
    answers, written = set(), set()
    for gamma in ("auto", 0, "auto"):
        llm = LLM(model_dir, target="int8", gamma=gamma, max_batch=2, max_tokens_in_kv=256)
        (result,) = llm.generate("abc", SamplingParams(temperature=0, max_tokens=20))
        answers.add(result.outputs[0].token_ids)
        (file,) = (tmp_path / "cache").iterdir()
        written.add(file.stat().st_mtime_ns)
    assert (len(answers), len(written)) == (1, 1)


def test_the_kv_cache_can_be_given_in_bytes(model_dir):
    llm = LLM(model_dir, kv_cache_bytes=40 * 2 * 2 * 2 * 16 * 2, gamma=0)
    assert llm.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    assert llm.engine.scheduler.blocks.num_blocks == 3
