"""Structured output: which tokens a grammar lets follow. Both views are masked by it.

The grammar advances with every drafted token and rolls back to where the request really is:
`allowed` is given the tokens so far and moves there. `llguidance` does the parsing; it is an
optional extra, imported when the first grammar is compiled.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError

__all__ = ["Grammar", "GrammarCompiler", "GuidedGrammar", "ToolCallSyntax"]

# Between the parts of JSON: enough to indent, too little for a model to lose itself in.
WHITESPACE = {"whitespace_pattern": "[ \\n\\r\\t]{0,16}"}
TOOL_BEGIN, TOOL_END = "<tool_call>", "</tool_call>"  # Hermes's, Qwen's and SmolLM2's way


class Grammar(Protocol):
    """What the engine needs of a grammar."""

    error: str | None  # why it had to end the answer, if it had to

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """[vocabulary] bool: what may follow these output tokens."""


class GuidedGrammar:
    """One request's place in a grammar.

    Args:
        matcher: an `llguidance.LLMatcher` at its beginning, this request's own.
        vocab_size: of the model's logits.
        end_ids: tokens that end an answer, allowed where the grammar is complete.
    """

    def __init__(self, matcher: Any, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._matcher, self._end_ids = matcher, frozenset(end_ids)
        self._only_end = torch.zeros(vocab_size, dtype=torch.bool)
        self._only_end[list(end_ids)] = True
        self._at: list[int] = []  # tokens that the matcher has consumed
        self.error: str | None = None

    def fresh(self) -> "GuidedGrammar":
        """The same grammar at its beginning, for another request."""
        matcher = self._matcher.deep_copy()
        matcher.reset()
        return GuidedGrammar(matcher, len(self._only_end), sorted(self._end_ids))

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """[vocabulary] bool: what may follow these output tokens.

        After the end, or where the parser gives up (`error` says why), only the end.
        """
        if self.error is None and (not tokens or tokens[-1] not in self._end_ids):
            self._move_to(list(tokens))
        if self.error is not None or self._matcher.is_stopped():
            return self._only_end
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        if self._matcher.is_error():
            self.error = self._matcher.get_error()
            return self._only_end
        mask = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        flat = mask.flatten()[: len(self._only_end)].bool()
        if not flat.any():
            self.error = "no token continues the answer"
            return self._only_end
        missing = len(self._only_end) - len(flat)
        return torch.cat((flat, flat.new_zeros(missing))) if missing else flat

    def _move_to(self, tokens: list[int]) -> None:
        shared = min(len(self._at), len(tokens))
        while self._at[:shared] != tokens[:shared]:
            shared -= 1
        if back := len(self._at) - shared:
            self._matcher.rollback(back)
        if shared < len(tokens):
            self._matcher.consume_tokens(tokens[shared:])
        self._at = tokens
        if self._matcher.is_error():
            self.error = self._matcher.get_error()


class ToolCallSyntax:
    """How calls are written: a JSON object {"name", "arguments"}, in tags among other text."""

    @staticmethod
    def schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """JSON schema of one call of one of these functions."""
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["name"]},
                    "arguments": tool.get("parameters") or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        return calls[0] if len(calls) == 1 else {"anyOf": calls}

    @staticmethod
    def lark(tools: Sequence[Mapping[str, Any]], *, is_required: bool, is_parallel: bool) -> str:
        """A Lark grammar: text with calls in tags, or nothing but calls.

        Text ends lazily, where the first tag begins: without that the lexer would take the tag's
        beginning for text and then stand before something that is neither.
        """
        schema = json.dumps({**ToolCallSyntax.schema(tools), "x-guidance": WHITESPACE})
        rest = f'/\\n?/ body /\\n?/ "{TOOL_END}"'
        body = f"body: %json {schema}\n"
        if is_required:
            start = f"start: call{' (GAP call)*' if is_parallel else ''}\nGAP: /\\n?/\n"
            return f'{start}call: "{TOOL_BEGIN}" {rest}\n{body}'
        start = f"start: {'call* TEXT' if is_parallel else 'call | TEXT'}\n"
        begin = f'begin[lazy]: TEXT "{TOOL_BEGIN}"\nTEXT: /(.|\\n)*/\n'
        return f"%llguidance {{}}\n{start}{begin}call: begin {rest}\n{body}"


class GrammarCompiler:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: a fast tokenizer of `transformers`.
        vocab_size: of the model's logits.
        end_ids: tokens that end an answer.

    Raises:
        QSpecError: `llguidance` is not installed, or the model names no end token.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: Sequence[int]) -> None:
        try:
            import llguidance
            import llguidance.hf
        except ImportError:
            raise QSpecError(
                "structured output needs llguidance; `pip install qspec-llm[server]` has it"
            ) from None
        if not end_ids:
            raise QSpecError("structured output needs an end token, and the model names none")
        self._vocab_size, self._end_ids = vocab_size, tuple(end_ids)
        self._matcher: Any = llguidance.LLMatcher
        self._tokenizer = llguidance.hf.from_tokenizer(
            tokenizer, n_vocab=vocab_size, eos_token=list(end_ids)
        )

    def json_schema(self, schema: Mapping[str, Any]) -> GuidedGrammar:
        """Exactly one JSON value that the schema allows."""
        try:
            grammar = self._matcher.grammar_from_json_schema(dict(schema), WHITESPACE)
            return self._compile(grammar)
        except (ValueError, TypeError) as error:
            raise QSpecError(f"the JSON schema cannot be used: {error}") from None

    def tool_calls(
        self, tools: Sequence[Mapping[str, Any]], *, is_required: bool, is_parallel: bool
    ) -> GuidedGrammar:
        """Text with tool calls in it, or tool calls alone.

        Args:
            tools: {"name", "parameters"} records, `parameters` a JSON schema.
            is_required: at least one call and nothing else.
            is_parallel: more than one call is allowed.
        """
        lark = ToolCallSyntax.lark(tools, is_required=is_required, is_parallel=is_parallel)
        return self._compile(self._matcher.grammar_from_lark(lark))

    def _compile(self, grammar: str) -> GuidedGrammar:
        """A grammar at its beginning.

        Raises:
            QSpecError: it is wrong, or too complex.
        """
        matcher = self._matcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0]
            raise QSpecError(f"the grammar cannot be used: {reason}")
        return GuidedGrammar(matcher, self._vocab_size, self._end_ids)
