"""Two versions of QSpec timed in turn: another installation runs the same steps when told to.

The other version is a process with weights of its own. `answer_turns` is what it runs, `Other` how
this process talks with it, in lines: first it says, as JSON, which steps it has and a hash of the
logits of each; then it answers each line "round" with the seconds of every step, and ends when
there are no more.

Knows nothing of models: `steps` makes what is timed.
"""

import json
import shlex
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, TextIO

from qspec_llm.bench.measure import WARM_UP_ROUNDS, Advance
from qspec_llm.bench.steps import StepCase, Steps
from qspec_llm.errors import QSpecError

__all__ = ["Comparison", "Other", "answer_turns", "compare"]

ROUND = "round"
PATIENCE = 20  # seconds for another version to end


def _names(cases: Iterable[StepCase]) -> list[dict[str, Any]]:
    """Cases as JSON has them."""
    return [asdict(case) for case in cases]


def _are_same(theirs: Any, ours: Sequence[StepCase]) -> bool:
    """Whether another version's names are of these cases; it may know more or less of a view."""

    def known(case: Any) -> Any:
        view = case["view"]
        return {**case, "view": (view["is_draft"], view["activation"])}

    try:
        return [known(case) for case in theirs] == [known(case) for case in _names(ours)]
    except (KeyError, TypeError):
        return False


def answer_turns(steps: Steps, asked: Iterable[str], answers: TextIO) -> None:
    """Run a round for every line that asks for one.

    Args:
        steps: what is timed.
        asked: lines.
        answers: where lines of JSON go.
    """
    first = {"cases": _names(steps.cases), "bits": steps.bits()}
    print(json.dumps(first), file=answers, flush=True)
    for line in asked:
        if line.strip() == ROUND:
            print(json.dumps(steps.round()), file=answers, flush=True)


class Other:
    """Another version of QSpec that takes turns with this one.

    Args:
        command: what starts it: "old/.venv/bin/qspec", or "env PYTHONPATH=old/src python -m
            qspec_llm".
        options: what it is started with, so that it measures the same steps in turn.

    Raises:
        QSpecError: it cannot be started.
    """

    def __init__(self, command: str, options: Sequence[str]) -> None:
        self._command = command
        try:
            self._process = subprocess.Popen(
                [*shlex.split(command), *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        except (OSError, ValueError, IndexError) as error:
            raise QSpecError(f"cannot start the other version by {command!r}: {error}") from None

    def __enter__(self) -> "Other":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._process.communicate(timeout=PATIENCE)  # closes its input, at which it ends
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def bits(self, cases: Sequence[StepCase]) -> list[str]:
        """Its hashes, once it is ready.

        Raises:
            QSpecError: it has ended, or does not have these steps.
        """
        first = self._answer()
        if not isinstance(first, dict) or not _are_same(first.get("cases"), cases):
            raise QSpecError(f"the version started by {self._command!r} measures other steps")
        bits: list[str] = first["bits"]
        return bits

    def round(self) -> list[float]:
        """The seconds of every step.

        Raises:
            QSpecError: it has ended.
        """
        assert self._process.stdin is not None
        try:
            print(ROUND, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._ended() from None
        seconds: list[float] = self._answer()
        return seconds

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        try:
            return json.loads(line)
        except ValueError:
            raise QSpecError(
                f"the version started by {self._command!r} said {line[:80]!r} instead of JSON"
            ) from None

    def _ended(self) -> QSpecError:
        status = self._process.wait(PATIENCE)
        return QSpecError(
            f"the version started by {self._command!r} has ended with status {status}; what it "
            "said of that is above"
        )


@dataclass(frozen=True)
class Comparison:
    """One step of two versions.

    Attributes:
        seconds: median of this version.
        other_seconds: median of the other one.
        aa_ratio: this version's second turns of all rounds against its first.
        has_same_bits: both versions compute the same logits.
    """

    seconds: float
    other_seconds: float
    aa_ratio: float
    has_same_bits: bool

    @property
    def ratio(self) -> float:
        """This version's time in that of the other."""
        return self.seconds / self.other_seconds


def compare(
    steps: Steps, other: Other, rounds: int, advance: Advance | None = None
) -> dict[StepCase, Comparison]:
    """Time steps of both versions, turn by turn, so that each always follows the other.

    A round has two turns of both, and how far this version's differ is what noise can do.

    Args:
        steps: this version's.
        other: the other version.
        rounds: rounds that count.
        advance: called after every round.

    Raises:
        QSpecError: the other version has ended, or measures other steps.
    """
    pairs = zip(steps.bits(), other.bits(steps.cases), strict=True)
    same = [ours == theirs for ours, theirs in pairs]
    first: list[list[float]] = []
    second: list[list[float]] = []
    others: list[list[float]] = []
    for index in range(WARM_UP_ROUNDS + rounds):
        for own in (first, second):
            turns = steps.round(), other.round()
            if index >= WARM_UP_ROUNDS:
                own.append(turns[0])
                others.append(turns[1])
        if advance is not None:
            advance()
    times = map(_by_case, (first, second, others))
    return {
        case: Comparison(
            seconds=statistics.median(before + after),
            other_seconds=statistics.median(between),
            aa_ratio=statistics.median(after) / statistics.median(before),
            has_same_bits=has_same_bits,
        )
        for case, has_same_bits, before, after, between in zip(
            steps.cases, same, *times, strict=True
        )
    }


def _by_case(rounds: list[list[float]]) -> list[list[float]]:
    return [list(times) for times in zip(*rounds, strict=True)]
