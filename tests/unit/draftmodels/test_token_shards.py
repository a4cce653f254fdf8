"""Token shards: what is read is what was written, or an error; never a part. And the draft vocabulary."""

import os
from pathlib import Path

import pytest
import torch

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.data.shards import ShardWriter, TokenShards
from paceline.draftmodels.data.vocabulary import draft_vocabulary
from paceline.server.errors import ConfigError, DataError

SEQUENCES = [TokenSequence((5, 6, 151_000), 1), TokenSequence((7,), 1), TokenSequence(tuple(range(300)), 17)]


def test_shards_come_back_as_they_were_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "shards")
    writer.write(3, SEQUENCES)
    writer.write(0, [])
    shards = TokenShards(tmp_path / "shards")
    assert shards.indices == [0, 3]
    assert (3 in shards, 1 in shards) == (True, False)
    assert shards.read(3) == SEQUENCES
    assert shards.read(0) == []
    with pytest.raises(DataError, match="there is no token shard"):
        shards.read(1)


def test_an_interrupted_write_leaves_the_old_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path)
    writer.write(0, SEQUENCES)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(DataError, match=r"cannot write .*No space left"):
            writer.write(0, SEQUENCES[:1])
    assert TokenShards(tmp_path).read(0) == SEQUENCES
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.safetensors"]


def test_what_a_killed_writer_left_is_no_shard_and_goes_away(tmp_path: Path) -> None:
    left = tmp_path / ".part-abc"
    left.write_bytes(b"half")
    assert TokenShards(tmp_path).indices == []
    ShardWriter(tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_shard_is_one_clear_error(damage: str, tmp_path: Path) -> None:
    ShardWriter(tmp_path).write(0, SEQUENCES)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-200] ^= 1
    if damage == "other":
        data[data.index(b"shard 1") + 6] = ord("9")
    path.write_bytes({"cut": bytes(data[:-1]), "empty": b""}.get(damage, bytes(data)))
    with pytest.raises(DataError, match="not a token shard" if damage == "other" else "is damaged") as caught:
        TokenShards(tmp_path).read(0)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_vocabulary_is_what_occurs_most() -> None:
    outputs = [(9, 9, 9, 4, 4), (4, 7, 7, 30, 2)]
    ids = draft_vocabulary(outputs, 3, vocab_size=40)
    assert ids.dtype is torch.int32
    assert ids.tolist() == [4, 7, 9]
    assert draft_vocabulary(outputs, 4, vocab_size=40).tolist() == [2, 4, 7, 9]  # of 2 and 30 the lower
    assert draft_vocabulary(outputs, 3, vocab_size=40, always=[39, 1]).tolist() == [1, 4, 39]


def test_a_vocabulary_is_filled_up_with_the_lowest_ids() -> None:
    assert draft_vocabulary([(5,)], 4, vocab_size=10, always=[1]).tolist() == [0, 1, 2, 5]
    assert draft_vocabulary([], 10, vocab_size=10).tolist() == list(range(10))


@pytest.mark.parametrize("size", [0, 1, 11])
def test_impossible_vocabularies_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"of {size} ids"):
        draft_vocabulary([(1, 2)], size, vocab_size=10, always=[3, 4])
