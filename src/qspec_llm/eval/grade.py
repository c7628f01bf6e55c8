"""Whether an answer is right: the last number of a text, or code that passes its tests.

Code that a model wrote is run only where the caller asks for it, in a process of its own: no
environment, an empty directory, limits on time, memory and files. That keeps accidents small; it is
no wall against malice.
"""

import re
import secrets
import subprocess
import sys
import tempfile
from decimal import Decimal, InvalidOperation

from qspec_llm.eval.prompts import EvalPrompt

__all__ = ["extract_code", "extract_number", "grade", "passes"]

SECONDS = 10.0
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
LIMITS = """\
import resource
resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
del resource
"""


def grade(prompt: EvalPrompt, text: str, *, can_execute: bool) -> bool | None:
    """Whether an answer is right; None where that is not or cannot be checked."""
    if prompt.answer is not None:
        return extract_number(text) == _decimal(prompt.answer)
    if prompt.tests and can_execute:
        return passes(prompt, extract_code(text))
    return None


def extract_number(text: str) -> Decimal | None:
    """The number after the last "Answer:", else the last number of a text."""
    _, marker, rest = text.rpartition("Answer:")
    found = NUMBER.findall(rest) if marker else NUMBER.findall(text)
    if not found:
        return None
    return _decimal(found[0] if marker else found[-1])


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None


def extract_code(text: str) -> str:
    """The first fenced block of an answer, else all of it."""
    match = FENCE.search(text)
    return match[1] if match else text


def passes(prompt: EvalPrompt, code: str) -> bool:
    """Run code and then the prompt's tests; whether all of it went through."""
    if prompt.entry_point and f"def {prompt.entry_point}(" not in code:
        code = prompt.preamble + code  # it continues the prompt's own lines
    elif prompt.preamble:
        code = _imports(prompt.preamble) + code
    # said at the end alone, so that code that exits early has not passed
    word = secrets.token_hex(16)
    program = "\n".join((LIMITS, code, *prompt.tests, f"print({word!r})"))
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", program],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
                check=False,
            )
        except (subprocess.TimeoutExpired, ValueError):  # ValueError: a null byte in the code
            return False
    return done.returncode == 0 and word.encode() in done.stdout


def _imports(preamble: str) -> str:
    """The import lines of a prompt's code."""
    lines = preamble.splitlines(keepends=True)
    return "".join(line for line in lines if line.startswith(("import ", "from ")))
