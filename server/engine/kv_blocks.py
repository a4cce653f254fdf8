"""KV cache bookkeeping: which block of the arena belongs to whom. Pure Python, no tensors, no HTTP.

One pool of equal blocks serves every model and member (target, draft, ...): a block is a fixed number of bytes, and
each member packs as many tokens into it as fit (``MemberLayout.block_tokens``). So there is one KV budget and one
free list, whatever is served. Full blocks of committed tokens are published under a hash chained over all tokens
before them; a published block whose last user is gone stays findable until its room is needed (least recently used
first). Terms: a table is *computed* up to the number of tokens whose K and V are valid.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class MemberLayout:
    """How one member uses blocks.

    Attributes:
        key: identity of what fills the blocks (weights, dtype); equal keys may share cached blocks.
        block_tokens: tokens per block.
    """

    key: str
    block_tokens: int

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens take."""
        return -(-num_tokens // self.block_tokens)


@dataclass(slots=True)
class BlockTable:
    """One sequence's blocks for one member, in token order.

    ``digests`` are the chained hashes of the leading blocks that are published or came from the cache.
    """

    layout: MemberLayout
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    digests: list[bytes] = field(default_factory=list)

    def rollback(self, num_tokens: int) -> None:
        """Forget K and V beyond ``num_tokens`` (rejected draft tokens); the blocks stay for reuse."""
        self.num_computed = min(self.num_computed, num_tokens)


def _chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


def _root(layout: MemberLayout) -> bytes:
    return hashlib.blake2b(f"{layout.key}/{layout.block_tokens}".encode(), digest_size=16).digest()


class KvBlocks:
    """Reference-counted blocks with prefix caching.

    Args:
        num_blocks: blocks in the arena.
        prefix_caching: whether finished blocks can be found again.
    """

    def __init__(self, num_blocks: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self._prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._unused = list(range(num_blocks - 1, -1, -1))
        self._cached_unused: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return len(self._unused) + len(self._cached_unused)

    def grow(self, tables: Sequence[tuple[BlockTable, int]]) -> bool:
        """Make every table hold its number of tokens; all or nothing.

        Returns:
            False if there are too few free blocks; then nothing has changed.
        """
        wanted = [max(0, t.layout.blocks_for(n) - len(t.blocks)) for t, n in tables]
        if sum(wanted) > self.num_free:
            return False
        for (table, _), count in zip(tables, wanted, strict=True):
            table.blocks.extend(self._take() for _ in range(count))
        return True

    def release(self, table: BlockTable) -> None:
        """Give all blocks of a table back; published ones stay findable, the deepest are evicted first."""
        for block in reversed(table.blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._digest_of:
                    self._cached_unused[block] = None
                else:
                    self._unused.append(block)
        table.blocks.clear()
        table.digests.clear()
        table.num_computed = 0

    def reuse_prefix(self, table: BlockTable, tokens: Sequence[int]) -> int:
        """Fill an empty table with cached blocks for the longest known prefix of ``tokens``.

        At least one token is left to compute, because its logits are needed.

        Returns:
            How many tokens were found.
        """
        assert not table.blocks
        if not self._prefix_caching:
            return 0
        size, digest = table.layout.block_tokens, _root(table.layout)
        for start in range(0, len(tokens) - size, size):
            digest = _chain(digest, tokens[start : start + size])
            block = self._block_of.get(digest)
            if block is None:
                break
            self._references[block] += 1
            self._cached_unused.pop(block, None)
            table.blocks.append(block)
            table.digests.append(digest)
        table.num_computed = len(table.blocks) * size
        return table.num_computed

    def publish(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Make the table's full computed blocks findable; ``tokens`` are the committed tokens behind it."""
        if not self._prefix_caching:
            return
        size = table.layout.block_tokens
        full = min(table.num_computed, len(tokens)) // size
        if full <= len(table.digests):
            return
        digest = table.digests[-1] if table.digests else _root(table.layout)
        for index in range(len(table.digests), full):
            digest = _chain(digest, tokens[index * size : (index + 1) * size])
            table.digests.append(digest)
            block = table.blocks[index]
            if digest not in self._block_of and block not in self._digest_of:
                self._block_of[digest] = block
                self._digest_of[block] = digest

    def _take(self) -> int:
        if self._unused:
            block = self._unused.pop()
        else:
            block, _ = self._cached_unused.popitem(last=False)
            del self._block_of[self._digest_of.pop(block)]
        assert self._references[block] == 0
        self._references[block] = 1
        return block
