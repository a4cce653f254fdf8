"""Block bookkeeping: nothing leaks, nothing is shared by mistake, cached blocks hold what their hash says."""

import random

import pytest

from paceline.server.engine.kv_blocks import BlockTable, KvBlocks, MemberLayout

SMALL, WIDE = MemberLayout("target", 4), MemberLayout("draft", 8)


def filled(blocks: KvBlocks, tokens: list[int], layout: MemberLayout = SMALL) -> BlockTable:
    table = BlockTable(layout)
    assert blocks.grow([(table, len(tokens))])
    table.num_computed = len(tokens)
    blocks.publish(table, tokens)
    return table


def test_grow_is_all_or_nothing():
    blocks = KvBlocks(3)
    a, b = BlockTable(SMALL), BlockTable(WIDE)
    assert not blocks.grow([(a, 8), (b, 9)])
    assert (a.blocks, b.blocks, blocks.num_free) == ([], [], 3)
    assert blocks.grow([(a, 8), (b, 8)])
    assert (len(a.blocks), len(b.blocks), blocks.num_free) == (2, 1, 0)


def test_prefix_is_found_in_whole_blocks_and_leaves_one_token_to_compute():
    blocks = KvBlocks(10)
    first = filled(blocks, list(range(12)))
    again = BlockTable(SMALL)
    assert blocks.reuse_prefix(again, list(range(12))) == 8
    assert again.blocks == first.blocks[:2]
    other = BlockTable(SMALL)
    assert blocks.reuse_prefix(other, [0, 1, 2, 3, 99, 5, 6, 7, 8]) == 4


def test_equal_tokens_after_a_different_beginning_are_not_shared():
    blocks = KvBlocks(10)
    filled(blocks, [1, 1, 1, 1, 5, 5, 5, 5, 0])
    table = BlockTable(SMALL)
    assert blocks.reuse_prefix(table, [2, 2, 2, 2, 5, 5, 5, 5, 0]) == 0


def test_members_do_not_share_blocks():
    blocks = KvBlocks(10)
    filled(blocks, list(range(17)), SMALL)
    assert blocks.reuse_prefix(BlockTable(MemberLayout("draft", 4)), list(range(17))) == 0


def test_uncommitted_or_uncomputed_tokens_are_not_published():
    blocks = KvBlocks(10)
    table = BlockTable(SMALL)
    blocks.grow([(table, 12)])
    table.num_computed = 7
    blocks.publish(table, list(range(12)))
    assert blocks.reuse_prefix(BlockTable(SMALL), list(range(12))) == 4


def test_released_blocks_stay_findable_until_their_room_is_needed_deepest_first():
    blocks = KvBlocks(4)
    blocks.release(filled(blocks, list(range(12))))
    assert blocks.num_free == 4
    taker = BlockTable(SMALL)
    assert blocks.grow([(taker, 8)])  # one unused block, then the deepest cached one
    assert blocks.reuse_prefix(BlockTable(SMALL), list(range(12))) == 8


def test_prefix_caching_can_be_switched_off():
    blocks = KvBlocks(4, prefix_caching=False)
    blocks.release(filled(blocks, list(range(12))))
    assert blocks.reuse_prefix(BlockTable(SMALL), list(range(12))) == 0


@pytest.mark.parametrize("seed", range(20))
def test_random_use_never_leaks_nor_aliases(seed):
    """Model: what each block was last computed for; a reused block must hold that prefix."""
    rng = random.Random(seed)
    blocks = KvBlocks(24)
    live: list[tuple[BlockTable, list[int]]] = []
    content: dict[int, tuple[str, tuple[int, ...]]] = {}
    for _ in range(400):
        if live and rng.random() < 0.45:
            table, tokens = live.pop(rng.randrange(len(live)))
            blocks.release(table)
        elif live and rng.random() < 0.3:
            table, tokens = rng.choice(live)
            table.rollback(rng.randint(0, table.num_computed))  # rejected drafts never reach below published
            table.num_computed = max(table.num_computed, len(table.digests) * table.layout.block_tokens)
        else:
            layout = rng.choice((SMALL, WIDE))
            tokens = [rng.randint(0, 1) for _ in range(rng.randint(1, 40))]
            table = BlockTable(layout)
            found = blocks.reuse_prefix(table, tokens)
            for i, block in enumerate(table.blocks):
                assert content[block] == (layout.key, tuple(tokens[: (i + 1) * layout.block_tokens]))
            if not blocks.grow([(table, len(tokens))]):
                blocks.release(table)
                continue
            for i in range(found // layout.block_tokens, len(table.blocks)):
                content[table.blocks[i]] = (layout.key, tuple(tokens[: (i + 1) * layout.block_tokens]))
            table.num_computed = len(tokens)
            blocks.publish(table, tokens)
            live.append((table, tokens))
        owned = {block for table, _ in live for block in table.blocks}
        assert blocks.num_free == 24 - len(owned)
    for table, _ in live:
        blocks.release(table)
    assert blocks.num_free == 24
