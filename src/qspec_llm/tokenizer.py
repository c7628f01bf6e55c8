"""Text to tokens and back, by `transformers`, imported only when a model is loaded."""

import contextlib
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from qspec_llm.errors import QSpecError

__all__ = ["HFTokenizer", "Message"]

Message = Mapping[str, Any]  # {"role": ..., "content": ...}
COMPOSED = 4  # characters that Unicode normalisation may make one of


class HFTokenizer:
    """The tokenizer of a model directory or GGUF file."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        where, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
        try:
            with _quiet():
                self._tokenizer: Any = AutoTokenizer.from_pretrained(str(where), **options)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            raise QSpecError(f"the tokenizer of {path} cannot be read: {reason}") from None
        self._fast: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        self._pieces: dict[int, str | None] = {}  # found so far

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a conversation is written."""
        return bool(self._tokenizer.chat_template)

    @property
    def hf(self) -> Any:
        """The tokenizer of `transformers` itself."""
        return self._tokenizer

    @property
    def chat_template(self) -> str:
        """How a conversation is written, a Jinja template; empty if the model does not say."""
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else str(template or "")

    def encode(self, text: str, *, has_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that a prompt begins with, or without."""
        return list(self._tokenizer(text, add_special_tokens=has_special_tokens)["input_ids"])

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Args:
            messages: {"role", "content"} records.
            tools: functions that the model may call, for a template that knows what they are.

        Raises:
            QSpecError: the model has no chat template, or it refuses the messages.
        """
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise QSpecError("the model has no chat template; use a raw prompt")
        try:
            ids = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=True,
                return_dict=False,
            )
        except (TemplateError, KeyError, TypeError) as error:
            raise QSpecError(f"the chat template refuses these messages: {error}") from None
        return list(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        if self._fast is not None:
            # what the library's own `decode` comes to, in 2 us instead of 12: twice a token
            return str(self._fast.decode(list(token_ids)))
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def piece(self, token_id: int) -> str | None:
        """What a token adds behind whole characters; None where nothing, or where it depends."""
        try:
            return self._pieces[token_id]
        except KeyError:
            piece = self._pieces[token_id] = self._piece(token_id)
            return piece

    def _piece(self, token_id: int) -> str | None:
        if self._fast is None or not self._joins_bytes:
            return None
        if token_id in self._tokenizer.added_tokens_decoder:
            return None
        name = self._fast.id_to_token(token_id)
        if not name or any(character not in _BYTE_OF for character in name):
            return None
        try:
            text = bytes(map(_BYTE_OF.__getitem__, name)).decode()
        except UnicodeDecodeError:  # a part of a character
            return None
        return None if "\N{REPLACEMENT CHARACTER}" in text else text

    @cached_property
    def _joins_bytes(self) -> bool:
        """Whether a text is nothing but the bytes of its tokens in a row."""
        decoder = json.loads(self._fast.to_str())["decoder"]
        return isinstance(decoder, dict) and decoder["type"] == "ByteLevel"

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; its name, if it is a special token."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        if token_id in self._tokenizer.added_tokens_decoder:
            return str(piece).encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF.get(character, 63) for character in piece)
        if match := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes([int(match[1], 16)])
        return str(piece).replace("\u2581", " ").encode()

    @cached_property
    def longest_piece(self) -> int | None:
        """Characters that one token stands for at most, generously; None where nobody knows.

        A text longer than so many times a limit of tokens need not be encoded to be refused.
        """
        if self._fast is None or not self._is_byte_level:
            return None
        return COMPOSED * max(map(len, self._fast.get_vocab(with_added_tokens=True)))

    @cached_property
    def _is_byte_level(self) -> bool:
        """Whether pieces are written in GPT-2's alphabet of one character a byte."""
        return "ByteLevel" in json.dumps(
            json.loads(self._tokenizer.backend_tokenizer.to_str())["decoder"]
        )

    def save(self, path: Path) -> None:
        """Write the tokenizer's files into a model directory."""
        self._tokenizer.save_pretrained(str(path))


def _gpt2_alphabet() -> dict[str, int]:
    """GPT-2's characters and their bytes: printable bytes are themselves, the rest from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + index): byte for index, byte in enumerate(others)},
    }


_BYTE_OF = _gpt2_alphabet()


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep a library's progress bars and notices off the terminal while it loads."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
