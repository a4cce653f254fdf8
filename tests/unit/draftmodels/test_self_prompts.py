"""Prompts that the target writes itself: the template's turn, what is kept, the same ones for the same seed."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from conftest import TinyCheckpoint
from tiny import EOS_ID

from paceline.draftmodels.data.self_prompts import self_prompts
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.local_engine import LocalEngine
from paceline.server.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")

Local = Callable[..., LocalEngine]


def test_the_target_writes_its_own_prompts(
    kernels: str, local: Local, tiny_checkpoint: TinyCheckpoint
) -> None:
    engine = local(tiny_checkpoint("llama", vocab_size=60), streams=16)  # so few ids that turns end often
    found = self_prompts(engine, 12, seed=2, max_prompt_tokens=200)
    assert found == self_prompts(engine, 12, seed=2, max_prompt_tokens=200)
    assert found != self_prompts(engine, 12, seed=3, max_prompt_tokens=200)
    assert len({p.tokens for p in found}) == 12
    template = engine.tokenizer.apply_chat_template([{"role": "user", "content": "Q"}])
    middle = engine.tokenizer.encode("Q")[0]
    before, after = template[: template.index(middle)], template[template.index(middle) + 1 :]
    for prompt in found:
        assert list(prompt.tokens[: len(before)]) == before
        assert list(prompt.tokens[-len(after) :]) == after
        assert len(before) + len(after) < len(prompt.tokens) <= 200
        assert prompt.category == "self"


class Scripted:
    """A target that says what it is told to, again and again."""

    def __init__(self, engine: LocalEngine, *texts: Sequence[int]) -> None:
        self.tokenizer, self._texts = engine.tokenizer, texts

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[TokenSequence]:
        texts = [self._texts[i % len(self._texts)] for i in range(len(prompts))]
        return [TokenSequence((*p, *text), len(p)) for p, text in zip(prompts, texts, strict=True)]


def test_of_what_the_target_writes_only_prompts_are_kept(local: Local) -> None:
    engine = local()
    space, ends = engine.tokenizer.encode(" "), [EOS_ID]
    said = [[30, 31, *ends], [32, 33], [*space, *ends], ends, [30, 31, *ends], [34] * 90 + ends, [35, *ends]]
    found = self_prompts(Scripted(engine, *said), 2, seed=0, max_prompt_tokens=80)
    words = [engine.tokenizer.decode([30, 31]), engine.tokenizer.decode([35])]
    wanted = [engine.tokenizer.apply_chat_template([{"role": "user", "content": w}]) for w in words]
    assert [list(prompt.tokens) for prompt in found] == wanted
    with pytest.raises(DataError, match="0 usable prompts in 32 attempts"):
        self_prompts(Scripted(engine, ends), 5, seed=0)
