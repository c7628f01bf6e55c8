"""Text to tokens and back, by `transformers`, imported only when a model is loaded."""

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qspec_llm.errors import QSpecError

__all__ = ["HFTokenizer", "Message"]

Message = Mapping[str, str]  # {"role": ..., "content": ...}


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

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a conversation is written."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that a prompt begins with."""
        return list(self._tokenizer(text)["input_ids"])

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Raises:
            QSpecError: the model has no chat template, or it refuses the messages.
        """
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise QSpecError("the model has no chat template; use a raw prompt")
        try:
            ids = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                return_dict=False,
            )
        except (TemplateError, KeyError, TypeError) as error:
            raise QSpecError(f"the chat template refuses these messages: {error}") from None
        return list(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def save(self, path: Path) -> None:
        """Write the tokenizer's files into a model directory."""
        self._tokenizer.save_pretrained(str(path))


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
