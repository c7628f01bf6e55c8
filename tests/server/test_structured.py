"""Grammars move to where they are asked about; tool calls are read however the text is cut."""

import itertools
import json
import random

import pytest

from qspec_llm.engine.grammar import GrammarCompiler
from qspec_llm.errors import QSpecError
from qspec_llm.server.responses import ToolCallReader

VOCABULARY, END = 272, 256
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS = [
    {"name": "add", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}
]


@pytest.fixture(scope="module")
def compiler(offline):
    return GrammarCompiler(offline.tokenizer.hf, VOCABULARY, (END,))


def ids(offline, text):
    return offline.tokenizer.encode(text)


def allowed_texts(offline, mask):
    return {offline.tokenizer.decode([token]) for token in mask.nonzero().flatten().tolist()}


def test_a_mask_is_over_the_models_vocabulary(compiler, offline):
    mask = compiler.json_schema(SCHEMA).allowed([])
    assert mask.shape == (VOCABULARY,)
    assert "{" in allowed_texts(offline, mask)
    assert not mask[END]


def test_the_end_is_allowed_when_the_value_is_complete_and_then_alone(compiler, offline):
    grammar = compiler.json_schema(SCHEMA)
    text = ids(offline, '{"a": 12, "b": "yy"}')
    for length in range(len(text)):
        assert not grammar.allowed(text[:length])[END]
    assert grammar.allowed(text)[END]
    after = grammar.allowed([*text, END])
    assert after[END]
    assert int(after.sum()) == 1
    assert grammar.error is None


def test_where_it_was_before_does_not_matter(compiler, offline):
    """Drafts advance it, rejections take it back, in any order."""
    grammar = compiler.json_schema(SCHEMA)
    texts = ['{"a": 12, "b": "yy"}', '{"a": -7,"b":"x"}', '{ "a":1 , "b": "x" }']
    prefixes = [ids(offline, text)[:n] for text in texts for n in range(len(text))]
    rng = random.Random(0)
    for _ in range(200):
        prefix = rng.choice(prefixes)
        assert bool((grammar.allowed(prefix) == grammar.fresh().allowed(prefix)).all())
        assert grammar.error is None


def test_copies_are_independent(compiler, offline):
    one = compiler.json_schema(SCHEMA)
    one.allowed(ids(offline, '{"a": 1'))
    other = one.fresh()
    assert "{" in allowed_texts(offline, other.allowed([]))
    assert "}" not in allowed_texts(offline, other.allowed([]))


def test_required_calls_are_nothing_but_calls(compiler, offline):
    single = compiler.tool_calls(TOOLS, is_required=True, is_parallel=False)
    call = ids(offline, '<tool_call>\n{"name": "add", "arguments": {"n": 5}}\n</tool_call>')
    assert allowed_texts(offline, single.allowed([])) == {"<"}
    assert single.allowed(call)[END]
    assert "<" not in allowed_texts(offline, single.allowed(call))
    many = compiler.tool_calls(TOOLS, is_required=True, is_parallel=True)
    assert "<" in allowed_texts(offline, many.allowed(call))
    assert many.allowed([*call, *call])[END]


def test_free_text_may_turn_into_a_call(compiler, offline):
    grammar = compiler.tool_calls(TOOLS, is_required=False, is_parallel=True)
    assert grammar.allowed(ids(offline, "Just a < text\n"))[END]
    begun = ids(offline, 'Let me see. <tool_call>{"name": "')
    assert allowed_texts(offline, grammar.allowed(begun)) == {"a"}
    assert not grammar.allowed(begun)[END]
    call = ids(offline, 'Let me see. <tool_call>{"name": "add", "arguments": {"n": 5}}</tool_call>')
    assert grammar.allowed(call)[END]
    single = compiler.tool_calls(TOOLS, is_required=False, is_parallel=False)
    assert single.allowed(call)[END]
    assert int(single.allowed(call).sum()) == 1


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "#/nowhere"}, {"pattern": "("}])
def test_a_wrong_schema_is_refused(compiler, schema):
    with pytest.raises(QSpecError):
        compiler.json_schema({"type": "string", **schema})


def test_a_model_without_an_end_cannot_follow_a_grammar(offline):
    with pytest.raises(QSpecError, match="end token"):
        GrammarCompiler(offline.tokenizer.hf, VOCABULARY, ())


# Reading calls out of text

CALL = '<tool_call>\n{"name": "add", "arguments": {"n": 5}}\n</tool_call>'


def read(text, cuts):
    reader, shown, calls = ToolCallReader(), "", []
    bounds = [0, *sorted(cuts), len(text)]
    for start, stop in itertools.pairwise(bounds):
        new_text, new_calls = reader.push(text[start:stop], is_final=stop == len(text))
        shown += new_text
        calls += new_calls
    return shown, [(c["index"], c["function"]["name"], c["function"]["arguments"]) for c in calls]


@pytest.mark.parametrize(
    ("text", "shown", "num_calls"),
    [
        ("no call at all", "no call at all", 0),
        (CALL, "", 1),
        (f"Well. {CALL}\n{CALL}", "Well. ", 2),
        ("a < b and <tool_ is no call", "a < b and <tool_ is no call", 0),
        ("<tool_call>{not json}</tool_call>", "<tool_call>{not json}</tool_call>", 0),
        ("cut off <tool_call>{", "cut off <tool_call>{", 0),
        ("ends with <tool", "ends with <tool", 0),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', 0),
    ],
)
def test_calls_are_read_however_the_text_is_cut(text, shown, num_calls):
    rng = random.Random(1)
    for _ in range(50):
        cuts = [rng.randrange(len(text) + 1) for _ in range(rng.randrange(6))]
        got, calls = read(text, cuts)
        assert got == shown
        assert calls == [(i, "add", json.dumps({"n": 5})) for i in range(num_calls)]
