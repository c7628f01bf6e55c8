"""Text as it grows: whole characters only, stop strings cut off, nothing lost or said twice."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers_engine import ByteTokenizer, PieceTokenizer
from helpers_model_dir import write_tokenizer
from qspec_llm.engine.text import TextStream
from qspec_llm.hub import resolve_model
from qspec_llm.tokenizer import HFTokenizer


def stream(tokens, stop=(), tokenizer=None):
    """Deltas of a stream after each token, its whole text, and whether a stop string ended it."""
    text = TextStream(tokenizer or ByteTokenizer(), stop)
    deltas = []
    for token in tokens:
        is_stopped = text.push(token)
        if is_stopped:
            break
        deltas.append(text.take(is_final=False))
    else:
        is_stopped = False
        text.finish()
    deltas.append(text.take(is_final=True))
    return deltas, text.text, is_stopped


def test_a_character_waits_for_its_last_byte():
    deltas, text, _ = stream("a€b😀".encode())
    assert deltas == ["a", "", "", "€", "b", "", "", "", "😀", ""]
    assert text == "a€b😀"


def test_a_stream_cut_inside_a_character_shows_what_the_tokenizer_shows():
    deltas, text, _ = stream("a€".encode()[:-1])
    assert deltas == ["a", "", "", "\ufffd"]
    assert text == "a\ufffd"


def test_a_broken_character_is_shown_once_what_follows_is_whole():
    deltas, text, _ = stream([0xE2, 0x82, ord("A"), ord("B")])
    assert deltas == ["", "", "\ufffdA", "B", ""]
    assert text == "\ufffdAB"


def test_tokens_without_text_are_passed_over():
    assert stream([97, 300, 98, 300])[:2] == (["a", "", "b", "", ""], "ab")


def test_a_character_spread_over_tokens_with_text_of_their_own():
    class Halves(ByteTokenizer):
        def decode(self, token_ids):
            pieces = [b"x\xf0\x9f", b"\x98", b"\x80y", b"z"]
            return b"".join(pieces[token] for token in token_ids).decode(errors="replace")

        def piece(self, token_id):
            return None

    deltas, text, _ = stream([0, 1, 2, 3], tokenizer=Halves())
    assert "".join(deltas) == text == "x😀yz"
    assert deltas[:2] == ["", ""]


def test_a_leading_space_that_decoding_alone_would_drop_is_kept():
    class Stripping(PieceTokenizer):
        def decode(self, token_ids):
            return super().decode(token_ids).removeprefix(" ")

    deltas, text, _ = stream([0, 1, 1], tokenizer=Stripping([" one", " two"]))
    assert deltas == ["one", " two", " two", ""]
    assert text == "one two two"


def test_what_may_begin_a_stop_string_is_held_back():
    deltas, text, is_stopped = stream(b"xyENx", ["END"])
    assert deltas == ["x", "y", "", "", "ENx", ""]
    assert text == "xyENx"
    assert not is_stopped


def test_a_stop_string_is_cut_off_with_all_after_it():
    pieces = ["Hello", " wor", "ld!\n\nBye", "more"]
    deltas, text, is_stopped = stream([0, 1, 2, 3], ["\n\n"], PieceTokenizer(pieces))
    assert is_stopped
    assert text == "".join(deltas) == "Hello world!"


def test_the_earliest_of_several_stop_strings_wins():
    assert stream(b"aXbc", ["bc", "X"])[1:] == ("a", True)
    tokenizer = PieceTokenizer(["one two three"])
    assert stream([0], ["three", "two"], tokenizer)[1:] == ("one ", True)


def test_held_back_text_comes_at_the_end():
    deltas, text, is_stopped = stream(b"abE", ["END"])
    assert deltas == ["a", "b", "", "E"]
    assert text == "abE"
    assert not is_stopped


def test_a_stop_string_counts_only_when_stopping_is_allowed():
    text = TextStream(ByteTokenizer(), ["b"])
    assert not text.push(ord("a"))
    assert not text.push(ord("b"), can_stop=False)
    assert not text.push(ord("c"))
    assert text.push(ord("b"))
    assert text.text == "abc"


@given(st.lists(st.integers(0, 300), max_size=60))
def test_deltas_of_any_bytes_add_up_to_the_decoded_whole(tokens):
    deltas, text, _ = stream(tokens)
    assert "".join(deltas) == text == ByteTokenizer().decode(tokens)


@given(st.text(max_size=20), st.integers(0, 8))
def test_deltas_of_any_text_cut_anywhere_add_up_to_the_decoded_whole(text, cut):
    data = text.encode()
    data = data[: len(data) - min(cut, len(data))]
    deltas, whole, _ = stream(data)
    assert "".join(deltas) == whole == data.decode(errors="replace")


def plain_stop(text: str, stop: list[str]) -> str | None:
    """Text up to the stop string that is complete first, None where there is none."""
    for end in range(len(text) + 1):
        found = [text.find(each) for each in stop if each in text[:end]]
        if found:
            return text[: min(found)]
    return None


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_equal_a_plain_search(text, stop):
    deltas, whole, is_stopped = stream(text.encode(), stop)
    expected = plain_stop(text, stop)
    assert "".join(deltas) == whole
    assert is_stopped == (expected is not None)
    assert whole == (text if expected is None else expected)


@pytest.mark.parametrize("seed", range(20))
def test_any_way_to_cut_text_into_tokens_gives_the_same_answer(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(30)) + "aXYb"
    cuts = sorted(rng.sample(range(1, 34), 8))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, None], strict=True)]
    deltas, whole, is_stopped = stream(range(len(pieces)), ["XY"], PieceTokenizer(pieces))
    assert is_stopped
    assert whole == "".join(deltas) == text[:-3]


@pytest.fixture(scope="module", params=["bytes", pytest.param("real", marks=pytest.mark.weights)])
def tokenizer(request, tmp_path_factory):
    if request.param == "real":
        return HFTokenizer(resolve_model("smollm2"))
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return HFTokenizer(path)


def test_what_a_tokenizer_says_of_single_tokens_is_what_it_decodes(tokenizer):
    size, draw = len(tokenizer.hf), random.Random(1)
    known = [token for token in range(size) if tokenizer.piece(token) is not None]
    assert len(known) >= 128
    for _ in range(200):
        # parts of characters, special tokens and whole words next to each other
        some = [draw.randrange(min(size, 600)) for _ in range(20)] + draw.sample(known, 20)
        tokens = draw.sample(some, 40)
        deltas, text, _ = stream(tokens, tokenizer=tokenizer)
        assert "".join(deltas) == text == tokenizer.decode(tokens)
