"""From tokens to text, one token at a time: whole characters only, stop strings cut off."""

from collections.abc import Sequence
from typing import Protocol

__all__ = ["TextStream", "Tokenizer"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders show for a character cut in the middle


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that a prompt begins with."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""

    def piece(self, token_id: int) -> str | None:
        """What a token adds behind whole characters; None where nothing, or where it depends."""


class TextStream:
    """The text of one request's output as it grows.

    A token's text may depend on those before it, so each decode starts a few tokens back, at the
    last point where the text was whole, and takes what is new. Characters cut in the middle wait
    for their other bytes. Text that may be the beginning of a stop string is held back by `take`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._context = 0  # first token of the decoding window
        self._whole = 0  # tokens whose text is in `text`
        self.text = ""
        self.ends: list[int] = []  # length of `text` after each token
        self.num_taken = 0

    def push(self, token: int, *, can_stop: bool = True) -> bool:
        """Add a token; True if a stop string appeared, which is then cut off with all after it."""
        self._tokens.append(token)
        is_stopped = self._advance(can_stop)
        self.ends.append(len(self.text))
        return is_stopped

    def _advance(self, can_stop: bool) -> bool:
        if self._whole == len(self._tokens) - 1:  # a tenth of the time where the tokenizer knows
            piece = self._tokenizer.piece(self._tokens[-1])
            if piece is not None:
                return self._extend(piece, can_stop)
        before = self._tokenizer.decode(self._tokens[self._context : self._whole])
        now = self._tokenizer.decode(self._tokens[self._context :])
        if len(now) <= len(before) or now.endswith(REPLACEMENT):
            return False
        return self._extend(now[len(before) :], can_stop)

    def _extend(self, new: str, can_stop: bool) -> bool:
        self._context, self._whole = self._whole, len(self._tokens)
        longest = max(map(len, self._stop), default=0)
        search_from = max(0, len(self.text) - longest + 1)
        self.text += new
        ends = [self.text.find(stop, search_from) for stop in self._stop if can_stop]
        if found := [end for end in ends if end >= 0]:
            self.text = self.text[: min(found)]
            return True
        return False

    def finish(self) -> None:
        """Take what an unfinished character left, as the tokenizer shows it."""
        if self._whole < len(self._tokens):
            before = self._tokenizer.decode(self._tokens[self._context : self._whole])
            now = self._tokenizer.decode(self._tokens[self._context :])
            self._extend(now[len(before) :], can_stop=False)

    def take(self, *, is_final: bool) -> str:
        """Text not taken yet; unless final, without a tail that may begin a stop string."""
        end = len(self.text)
        if not is_final:
            end -= max((_overlap(self.text, stop) for stop in self._stop), default=0)
        new = self.text[self.num_taken : max(end, self.num_taken)]
        self.num_taken += len(new)
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
