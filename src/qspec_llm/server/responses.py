"""From the engine's news to response bodies. Pure functions of what was generated."""

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qspec_llm.engine.request import Request, TokenLogprobs
from qspec_llm.server.jobs import News
from qspec_llm.tokenizer import HFTokenizer

__all__ = [
    "Body",
    "Choice",
    "ToolCallReader",
    "chat_logprobs",
    "completion_logprobs",
    "metrics",
    "origins",
    "usage",
]

Body = dict[str, Any]  # of a response, or a part of one
TOOL_BEGIN, TOOL_END = "<tool_call>", "</tool_call>"
LEAST_LOGPROB = -9999.0  # JSON has no -inf


@dataclass
class Choice:
    """One completion as it grows.

    `text` is all that is certain; `request` is there once it ended.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    request: Request | None = None

    def add(self, news: News) -> None:
        """Take a step's news."""
        self.text += news.emission.text
        self.token_ids += news.emission.token_ids
        self.logprobs += news.logprobs
        self.prompt_logprobs += news.prompt_logprobs
        self.ends += news.ends
        self.request = news.finished


def usage(num_prompt: int, requests: Sequence[Request], num_generated: int) -> dict[str, Any]:
    """Tokens used by one body."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": sum(r.num_cached for r in requests)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(r.num_accepted for r in requests),
            "rejected_prediction_tokens": sum(r.num_drafted - r.num_accepted for r in requests),
        },
    }


def metrics(requests: Sequence[Request]) -> dict[str, Any]:
    """What speculation did for one body."""
    num_cycles = sum(request.num_cycles for request in requests)
    num_drafted = sum(request.num_drafted for request in requests)
    num_accepted = sum(request.num_accepted for request in requests)
    longest = max((max(r.cycles_by_accepted, default=0) for r in requests), default=0)
    histogram = [
        sum(request.cycles_by_accepted.get(length, 0) for request in requests)
        for length in range(longest + 1)
    ]
    return {
        "speculative_decoding": {
            "mean_acceptance_length": 1 + num_accepted / num_cycles if num_cycles else None,
            "draft_acceptance_rate": num_accepted / num_drafted if num_drafted else None,
            "acceptance_histogram": histogram if num_drafted else [],
        }
    }


def origins(news: News) -> dict[str, Any]:
    """Pieces of new text and who made them."""
    emission = news.emission
    return {
        "segments": [
            {"text": segment.text, "is_drafted": segment.is_drafted}
            for segment in emission.segments
        ],
        "num_tokens": len(emission.token_ids),
        "num_accepted": emission.num_drafted,
        "gamma": news.gamma,
    }


def _name(data: bytes) -> str:
    """How a token's bytes are shown: as text, or escaped where they are a part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(
    tokenizer: HFTokenizer, entries: Iterable[TokenLogprobs], num_top: int
) -> dict[str, Any]:
    """`logprobs` of a chat choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {
            "token": _name(data),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(data),
        }

    return {
        "content": [
            {
                **entry(each.token_id, each.logprob),
                "top_logprobs": [entry(token, value) for token, value in each.top[:num_top]],
            }
            for each in entries
        ],
        "refusal": None,
    }


def completion_logprobs(
    tokenizer: HFTokenizer,
    tokens: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    offsets: Sequence[int],
) -> dict[str, Any]:
    """`logprobs` of a completion choice; the first token of an echoed prompt has none."""
    return {
        "tokens": [_name(tokenizer.token_bytes(token)) for token in tokens],
        "token_logprobs": [e and max(e.logprob, LEAST_LOGPROB) for e in entries],
        "top_logprobs": [
            e
            and {
                _name(tokenizer.token_bytes(token)): max(value, LEAST_LOGPROB)
                for token, value in (*e.top, (e.token_id, e.logprob))
            }
            for e in entries
        ],
        "text_offset": list(offsets),
    }


class ToolCallReader:
    """Splits an answer, as it grows, into text and calls.

    Text that may be the beginning of a call is held back; a call is given when it is whole.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self._rest = ""
        self._is_behind_call = False

    def push(self, text: str, *, is_final: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Text to hand out now, and the calls that became whole.

        Newlines behind a call only set it apart, and are no text.
        """
        self._rest += text
        shown, new = "", []
        while True:
            if self._is_behind_call:
                self._rest = self._rest.lstrip("\n")
                self._is_behind_call = not self._rest
            before, begin, after = self._rest.partition(TOOL_BEGIN)
            inner, end, behind = after.partition(TOOL_END)
            if not end:
                break
            call = _read_call(inner, len(self.calls))
            shown += before if call else before + begin + inner + end
            if call:
                self.calls.append(call)
                new.append(call)
                self._is_behind_call = True
            self._rest = behind
        if is_final:
            keep = 0
        elif begin:
            keep = len(self._rest) - len(before)
        else:
            keep = _overlap(self._rest, TOOL_BEGIN)
        stop = len(self._rest) - keep
        shown, self._rest = shown + self._rest[:stop], self._rest[stop:]
        return shown, new


def _overlap(text: str, begin: str) -> int:
    for length in range(min(len(text), len(begin) - 1), 0, -1):
        if text.endswith(begin[:length]):
            return length
    return 0


def _read_call(text: str, index: int) -> dict[str, Any] | None:
    """A call in OpenAI's shape; None if it is none."""
    try:
        value = json.loads(text)
        name, arguments = value["name"], value.get("arguments", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    return {
        "index": index,
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
    }
