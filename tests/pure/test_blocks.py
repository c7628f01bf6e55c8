"""The block allocator: every block is free or in exactly one table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qspec_llm.errors import QSpecError
from qspec_llm.kv.blocks import BLOCK_SIZE, BlockAllocator, blocks_for, extend_keys


def test_blocks_round_up():
    assert [blocks_for(n) for n in (0, 1, BLOCK_SIZE, BLOCK_SIZE + 1)] == [0, 1, 1, 2]


def test_a_cache_without_blocks_is_refused():
    with pytest.raises(QSpecError, match="0 blocks"):
        BlockAllocator(0)


def test_growing_is_all_or_nothing():
    blocks, table = BlockAllocator(3), []
    assert blocks.grow(table, 2 * BLOCK_SIZE)
    before = list(table)
    assert not blocks.grow(table, 4 * BLOCK_SIZE)
    assert table == before
    assert blocks.num_free == 1
    assert blocks.grow(table, 3 * BLOCK_SIZE)
    assert table[:2] == before


def test_growing_to_less_keeps_the_table():
    blocks, table = BlockAllocator(3), []
    blocks.grow(table, 40)
    before = list(table)
    assert blocks.grow(table, 1)
    assert table == before


def test_release_empties_the_table_and_twice_is_harmless():
    blocks, table = BlockAllocator(3), []
    blocks.grow(table, 48)
    blocks.release(table)
    blocks.release(table)
    assert table == []
    blocks.check_idle()


def test_a_block_that_is_still_held_counts_as_leaked():
    blocks = BlockAllocator(2)
    blocks.grow([], 1)
    with pytest.raises(AssertionError, match="leaked"):
        blocks.check_idle()


@given(
    num_blocks=st.integers(1, 12),
    actions=st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 200)), max_size=60),
)
def test_tables_never_share_a_block(num_blocks, actions):
    blocks, tables = BlockAllocator(num_blocks), [[] for _ in range(4)]
    for which, num_tokens in actions:
        if num_tokens < 0:
            blocks.release(tables[which])
        else:
            before = list(tables[which])
            fits = blocks_for(num_tokens) - len(before) <= blocks.num_free
            assert blocks.grow(tables[which], num_tokens) == fits
            assert tables[which][: len(before)] == before
            assert not fits or len(tables[which]) >= blocks_for(num_tokens)
        held = [block for table in tables for block in table]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(num_blocks))
        assert len(held) + blocks.num_free == num_blocks
    for table in tables:
        blocks.release(table)
    blocks.check_idle()


# Keys


def keys_of(tokens, num_prompt, salt=b""):
    keys = []
    extend_keys(keys, tokens, num_prompt, salt)
    return keys


def test_a_key_stands_for_all_tokens_up_to_its_blocks_end():
    tokens = list(range(5 * BLOCK_SIZE + 3))
    keys = keys_of(tokens, len(tokens))
    assert len(set(keys)) == 5
    for changed in (0, BLOCK_SIZE, 4 * BLOCK_SIZE + 15):
        other = keys_of([*tokens[:changed], 999, *tokens[changed + 1 :]], len(tokens))
        same = [a == b for a, b in zip(keys, other, strict=True)]
        assert same == [index < changed // BLOCK_SIZE for index in range(5)]


def test_a_key_stands_for_the_kernels_that_compute_each_position():
    tokens = list(range(3 * BLOCK_SIZE))
    by_prompt = {n: keys_of(tokens, n) for n in range(len(tokens) + 1)}
    assert len({keys[-1] for keys in by_prompt.values()}) == len(by_prompt)
    assert by_prompt[20][:1] == by_prompt[48][:1]
    assert by_prompt[20][1:] != by_prompt[48][1:]


def test_keys_grow_as_tokens_come():
    tokens, keys = [*range(100)], []
    for stop in (10, 16, 40, 99, 100):
        extend_keys(keys, tokens[len(keys) * BLOCK_SIZE : stop], 30, b"s")
    assert keys == keys_of(tokens, 30, b"s")
    assert keys != keys_of(tokens, 30)


# Sharing


def publish_all(blocks, table, keys):
    for block, key in zip(table, keys, strict=False):
        blocks.publish(block, key)


def test_a_released_block_is_found_until_its_room_is_needed():
    blocks, table = BlockAllocator(3), []
    blocks.grow(table, 3 * BLOCK_SIZE)
    publish_all(blocks, table, [b"a", b"b"])
    held = list(table)
    assert blocks.find([b"a", b"b", b"c"]) == held[:2]
    blocks.release(table)
    assert blocks.num_free == 3
    assert blocks.find([b"a", b"b"]) == held[:2]
    assert blocks.find([b"b"]) == held[1:2]
    blocks.grow(table, 2 * BLOCK_SIZE)  # the blank one, then the last block of the prefix
    assert blocks.find([b"a", b"b"]) == held[:1]
    assert blocks.num_evicted == 1


def test_room_counts_what_is_found_once():
    blocks, table = BlockAllocator(4), []
    blocks.grow(table, 3 * BLOCK_SIZE)
    publish_all(blocks, table, [b"a", b"b"])
    found = blocks.find([b"a", b"b"])
    assert blocks.can_hold(found, 3 * BLOCK_SIZE)
    assert not blocks.can_hold(found, 4 * BLOCK_SIZE)
    blocks.release(table)  # now the found blocks are themselves free
    assert blocks.can_hold(found, 4 * BLOCK_SIZE)
    assert not blocks.can_hold(found, 5 * BLOCK_SIZE)


def test_a_key_is_published_once():
    blocks, one, two = BlockAllocator(2), [], []
    blocks.grow(one, 1)
    blocks.grow(two, 1)
    blocks.publish(one[0], b"a")
    blocks.publish(two[0], b"a")
    assert blocks.find([b"a"]) == one
    assert blocks.num_published == 1
    blocks.release(one)
    blocks.release(two)
    blocks.check_idle()


@given(
    num_blocks=st.integers(1, 10),
    actions=st.lists(
        st.tuples(st.integers(0, 3), st.integers(-1, 8), st.integers(1, 4)), max_size=60
    ),
)
def test_shared_blocks_keep_their_content(num_blocks, actions):
    """`content` is what a cache would hold: a key's block never changes while it can be found."""
    blocks, content = BlockAllocator(num_blocks), {}
    tables = [[] for _ in range(4)]
    for which, kind, length in actions:
        table = tables[which]
        if kind < 0:
            blocks.release(table)
            continue
        if table:
            continue
        keys = [bytes([kind, index]) for index in range(length)]
        found = blocks.find(keys)
        assert [content[block] for block in found] == keys[: len(found)]
        if not blocks.can_hold(found, (length + 1) * BLOCK_SIZE):
            continue
        blocks.share(table, found)
        assert blocks.grow(table, (length + 1) * BLOCK_SIZE)
        fresh = table[len(found) :]
        assert all(blocks.count(block) == 1 for block in fresh)
        assert not any(block in other for block in fresh for other in tables if other is not table)
        for block, key in zip(table, keys, strict=False):
            content[block] = key
            blocks.publish(block, key)
        content[table[-1]] = None
    for block in range(num_blocks):
        assert blocks.count(block) == sum(block in table for table in tables)
    for table in tables:
        blocks.release(table)
    blocks.check_idle()
