"""Calibration text: what the model reads while it is quantised.

What ships in calibration.jsonl are answers that SmolLM2-135M-Instruct and
Qwen2.5-Coder-0.5B-Instruct (both Apache-2.0) wrote to prompts made for this purpose; none of these
is a prompt of `qspec_llm.eval.prompts`. Text of either model serves the other as well as its own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError

__all__ = ["CalibrationText", "Encoder", "Sample", "encode", "read_samples"]

HELD_OUT = 8  # of so many samples one is never fitted, only measured
WINDOW = 512  # tokens of plain text that are read together


class Encoder(Protocol):
    """The part of a tokenizer that calibration needs."""

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a conversation is written."""

    def encode(self, text: str, *, has_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def encode_chat(self, messages: Sequence[Any]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""


@dataclass(frozen=True)
class Sample:
    """A conversation of one turn, or plain text where `prompt` is None."""

    prompt: str | None
    answer: str


@dataclass(frozen=True)
class CalibrationText:
    """Sequences of tokens, end to end; those that are only measured come last.

    Attributes:
        tokens: [T] int64.
        positions: [T] int64, of a token in its own sequence.
        bounds: first row of every sequence, and T.
        num_fitted: rows that may be fitted; the rest are held out.
        is_answer: [T] bool, rows whose next token is part of an answer.
    """

    tokens: Tensor
    positions: Tensor
    bounds: tuple[int, ...]
    num_fitted: int
    is_answer: Tensor

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return len(self.tokens)

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> "CalibrationText":
        """Sequences of token ids, none held out, each an answer from its second token on."""
        bounds = [0, *accumulate(len(sequence) for sequence in sequences)]
        return cls(
            tokens=torch.tensor([token for sequence in sequences for token in sequence]),
            positions=torch.cat([torch.arange(len(sequence)) for sequence in sequences]),
            bounds=tuple(bounds),
            num_fitted=bounds[-1],
            is_answer=torch.ones(bounds[-1], dtype=torch.bool),
        )

    def first(self, num_tokens: int) -> "CalibrationText":
        """The first sequences, up to so many tokens but at least one; all of them fitted."""
        count = max(1, sum(bound <= num_tokens for bound in self.bounds[1:]))
        stop = self.bounds[count]
        return CalibrationText(
            tokens=self.tokens[:stop],
            positions=self.positions[:stop],
            bounds=self.bounds[: count + 1],
            num_fitted=stop,
            is_answer=self.is_answer[:stop],
        )

    def spans(self) -> list[slice]:
        """The rows of every sequence."""
        return [slice(a, b) for a, b in zip(self.bounds, self.bounds[1:], strict=False)]


def read_samples(source: str) -> list[Sample]:
    """Samples of "builtin", of a JSON Lines file of {"prompt", "answer"} or {"text"}, or of a text.

    Raises:
        QSpecError: the file cannot be read, or holds nothing.
    """
    path = Path(__file__).parent / "calibration.jsonl" if source == "builtin" else Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QSpecError(f"the calibration text {path} cannot be read: {error}") from None
    if not text.strip():
        raise QSpecError(f"the calibration text {path} is empty")
    if path.suffix != ".jsonl":
        return [Sample(None, text)]
    lines = enumerate(text.splitlines(), 1)
    return [_parse(f"line {number} of {path}", line) for number, line in lines if line.strip()]


def _parse(where: str, line: str) -> Sample:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise QSpecError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict) or record.keys() not in ({"prompt", "answer"}, {"text"}):
        raise QSpecError(f'{where} is neither {{"prompt", "answer"}} nor {{"text"}}')
    if not all(isinstance(value, str) and value.strip() for value in record.values()):
        raise QSpecError(f"{where} has an empty value, or one that is no string")
    return Sample(record.get("prompt"), str(record.get("answer", record.get("text"))))


def encode(samples: Sequence[Sample], encoder: Encoder, max_tokens: int) -> CalibrationText:
    """Samples as tokens, the first that fit into `max_tokens`.

    Prompts are put as conversations where the model has a chat template. Every `HELD_OUT`-th
    sequence is held out.

    Raises:
        QSpecError: fewer than two sequences come out, so that none could be held out.
    """
    sequences: list[tuple[list[int], int]] = []
    room = max_tokens
    for sample in samples:
        for tokens, num_given in _sequences(sample, encoder):
            if len(tokens) <= room:
                sequences.append((tokens, num_given))
                room -= len(tokens)
    if len(sequences) < 2:
        raise QSpecError(
            f"the calibration text gives {len(sequences)} sequences within {max_tokens} tokens; "
            "at least two are needed, one to fit and one to measure"
        )
    period = min(HELD_OUT, len(sequences))
    held_out = sequences[period - 1 :: period]
    fitted = [s for index, s in enumerate(sequences) if (index + 1) % period]
    ordered = fitted + held_out
    bounds = [0]
    for tokens, _ in ordered:
        bounds.append(bounds[-1] + len(tokens))
    return CalibrationText(
        tokens=torch.tensor([token for tokens, _ in ordered for token in tokens]),
        positions=torch.cat([torch.arange(len(tokens)) for tokens, _ in ordered]),
        bounds=tuple(bounds),
        num_fitted=bounds[len(fitted)],
        is_answer=torch.cat([torch.arange(len(t)) >= given - 1 for t, given in ordered]),
    )


def _sequences(sample: Sample, encoder: Encoder) -> list[tuple[list[int], int]]:
    """(tokens, how many of them are given) of a sample."""
    if sample.prompt is None:
        tokens = encoder.encode(sample.answer)
        cuts = [tokens[first : first + WINDOW] for first in range(0, len(tokens), WINDOW)]
        return [(cut, 1) for cut in cuts if len(cut) > 1]
    if encoder.has_chat_template:
        given = encoder.encode_chat([{"role": "user", "content": sample.prompt}])
    else:
        given = encoder.encode(sample.prompt + "\n")
    return [(given + encoder.encode(sample.answer, has_special_tokens=False), len(given))]
