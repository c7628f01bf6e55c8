"""`qspec run-batch` and `qspec bench serve` as a user runs them."""

import json

import pytest

from helpers_server import running
from qspec_llm.cli import main


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QSPEC_CACHE", str(tmp_path / "cache"))


def line(custom_id, body, url="/v1/completions"):
    body = {"model": "tiny", "temperature": 0, "max_tokens": 12, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def run_batch(model_dir, tmp_path, lines):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines) + "\n\n")
    options = ["-i", str(source), "-o", str(target), "--target", "int8", "--max-batch", "4"]
    options += ["--served-model-name", "tiny", "--max-tokens-in-kv", "1024"]
    status = main(["run-batch", str(model_dir), *options])
    if status:
        return status, {}
    records = [json.loads(text) for text in target.read_text().splitlines()]
    return status, {record["custom_id"]: record["response"] for record in records}


def test_a_batch_file_is_answered_line_by_line(model_dir, tmp_path, offline, capsys):
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    lines = [line(f"c{index}", {"prompt": f"number {index}"}) for index in range(10)]
    lines += [
        line("chat", chat, "/v1/chat/completions"),
        line("wrong", {"prompt": "a", "temperature": -1}),
        line("stream", {"prompt": "a", "stream": True}),
        line("other", {"prompt": "a", "model": "gpt-4"}),
    ]
    status, found = run_batch(model_dir, tmp_path, lines)
    assert status == 0
    assert len(found) == 14
    from qspec_llm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=12)
    for index in range(10):
        response = found[f"c{index}"]
        assert response["status_code"] == 200
        (result,) = offline.generate([f"number {index}"], params)
        assert response["body"]["choices"][0]["text"] == result.outputs[0].text
    assert found["chat"]["body"]["choices"][0]["message"]["content"]
    statuses = {name: found[name]["status_code"] for name in ("wrong", "stream", "other")}
    assert statuses == {"wrong": 400, "stream": 400, "other": 404}
    assert found["wrong"]["body"]["error"]["param"] == "temperature"
    assert "3 of them refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1"),
        ('{"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}}', "method"),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}}', "url"),
        (line("a", {"prompt": "x"}) + "\n" + line("a", {"prompt": "x"}), "twice"),
        ("", "no requests"),
    ],
)
def test_a_wrong_batch_file_is_refused_before_the_model_is_loaded(
    model_dir, tmp_path, text, message, capsys
):
    status, _ = run_batch(model_dir, tmp_path, [text])
    assert status == 2
    assert message in capsys.readouterr().err


def bench(capsys, *argv):
    assert main(["bench", "serve", *argv, "--json", "--warm-up", "1"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("pattern", [("--concurrency", "4"), ("--rate", "40")])
def test_a_running_server_is_measured(server, capsys, tmp_path, pattern):
    report = bench(
        capsys, "--url", server.url, "--model-name", "tiny", *pattern, "--requests", "12",
        "--max-tokens", "10", "--prompt-words", "12", "--shared-words", "8",
        "--body", '{"ignore_eos": true}', "--plot", str(tmp_path / "plots"),
    )  # fmt: skip
    assert (report["requests"], report["failed"], report["output_tokens"]) == (12, 0, 120)
    assert report["tokens_per_second"] > 0
    for name in ("time_to_first_token", "time_per_token", "end_to_end"):
        assert 0 < report[name]["p50"] <= report[name]["p90"] <= report[name]["p99"]
    for path in report["plots"]:
        with open(path, "rb") as file:  # noqa: PTH123
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_failures_are_counted_and_all_failing_is_an_error(server, capsys):
    options = ["--url", server.url, "--requests", "3", "--warm-up", "0"]
    assert main(["bench", "serve", *options, "--model-name", "nonsense"]) == 2
    assert "model_not_found" in capsys.readouterr().err


def test_a_model_is_served_measured_and_compared_with_the_offline_api(model_dir, capsys):
    report = bench(
        capsys, str(model_dir), "--requests", "6", "--max-tokens", "8", "--prompt-words", "4",
        "--max-batch", "4", "--gamma", "1", "--threads", "1", "--no-stream", "--offline",
        "--rounds", "2",
    )  # fmt: skip
    assert report["output_tokens"] == 48
    assert len(report["rounds"]) == len(report["offline"]["ratios"]) == 2
    assert report["offline"]["server_over_offline"] > 0


def test_serving_needs_no_key_and_lets_nobody_in_by_default(make_llm):
    from qspec_llm.cli.parser import parser

    args = parser().parse_args(["serve", "smollm2"])
    assert args.host == "127.0.0.1"
    with running(make_llm(max_tokens_in_kv=512)) as one:
        assert one.url.startswith("http://127.0.0.1")
