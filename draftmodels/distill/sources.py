"""Where text comes from and where drafts are measured: the real engine, files of prompts, shards in the run's folder.

Fills the seams ``TextSource`` and ``Judge`` of ``parts``. What was written once is read from its shard ever after,
so that a resumed job trains on the same text.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from paceline.draftmodels.data.prompts import Prompt, read_prompts, split_held_out
from paceline.draftmodels.data.seeds import derive_seed
from paceline.draftmodels.data.self_prompts import self_prompts
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.data.shards import ShardWriter, TokenShards
from paceline.draftmodels.distill import order
from paceline.draftmodels.distill.config import Recipe
from paceline.draftmodels.local_engine import LocalEngine
from paceline.server.errors import DataError

_log = logging.getLogger(__name__)


class FilePrompts:
    """The prompts of a file, some held out."""

    def __init__(self, recipe: Recipe, local: LocalEngine) -> None:
        found = read_prompts(Path(recipe.prompts), local.tokenizer)
        kept = [prompt for prompt in found if len(prompt.tokens) <= recipe.prompt_tokens]
        if len(kept) < len(found):
            _log.info(
                "%d of %d prompts are longer than %d tokens",
                len(found) - len(kept),
                len(found),
                recipe.prompt_tokens,
            )
        if not kept:
            raise DataError(f"all prompts of {recipe.prompts} are longer than {recipe.prompt_tokens} tokens")
        if recipe.source == "fixed":
            kept = [prompt for prompt in kept if prompt.answer]
            if not kept:
                raise DataError(f'{recipe.prompts} holds no answers, which source "fixed" trains on')
        self._training, self.held_out = split_held_out(kept, recipe.held_out, recipe.seed)
        self._recipe = recipe

    def of_round(self, round_: int) -> list[Prompt]:
        """The prompts that a round answers."""
        chosen = order.prompts_of_round(
            len(self._training), self._recipe.round_prompts, round_, self._recipe.seed
        )
        return [self._training[i] for i in chosen]


class SelfPrompts:
    """Prompts that the target writes when they are first needed; afterwards they are read from shards."""

    def __init__(self, recipe: Recipe, local: LocalEngine, folder: Path) -> None:
        self._recipe, self._local = recipe, local
        self._shards, self._writer = TokenShards(folder), ShardWriter(folder)
        self._groups = -(-recipe.self_prompts // recipe.round_prompts)
        self.held_out = self._group(0, recipe.held_out)

    def of_round(self, round_: int) -> list[Prompt]:
        """The prompts that a round answers, without those that are held out."""
        held_out = {prompt.tokens for prompt in self.held_out}
        prompts = self._group(1 + round_ % self._groups, self._recipe.round_prompts)
        return [prompt for prompt in prompts if prompt.tokens not in held_out]

    def _group(self, index: int, count: int) -> list[Prompt]:
        if index not in self._shards:
            self._local.use_draft(None)
            seed = derive_seed(self._recipe.seed, "self", index)
            written = self_prompts(
                _Unsteered(self._local), count, seed=seed, max_prompt_tokens=self._recipe.prompt_tokens
            )
            self._writer.write(
                index, [TokenSequence(prompt.tokens, len(prompt.tokens)) for prompt in written]
            )
        return [Prompt(sequence.tokens) for sequence in self._shards.read(index)]


class _Unsteered:
    """The target alone: what begins a prompt is no conversation that a steered model's members could read."""

    def __init__(self, local: LocalEngine) -> None:
        self.tokenizer = local.tokenizer
        self.generate = partial(local.generate, steered=False)


Prompts = FilePrompts | SelfPrompts


def open_prompts(recipe: Recipe, local: LocalEngine, run: Path) -> Prompts:
    """The prompts of a recipe.

    Raises:
        DataError: a file without usable prompts.
        ConfigError: ``self`` with a target that has no chat template.
    """
    return (
        SelfPrompts(recipe, local, run / "prompts")
        if recipe.prompts == "self"
        else FilePrompts(recipe, local)
    )


class EngineText:
    """A round's answers, by whoever the recipe says writes them."""

    def __init__(self, recipe: Recipe, local: LocalEngine, prompts: Prompts, folder: Path) -> None:
        self._recipe, self._local, self._prompts = recipe, local, prompts
        self._shards, self._writer = TokenShards(folder), ShardWriter(folder)

    def sequences(self, round_: int, draft: Path | None) -> list[TokenSequence]:
        """See ``parts.TextSource``."""
        if round_ not in self._shards:
            self._writer.write(round_, self._written(round_, draft))
        return self._shards.read(round_)

    def by_target(self, round_: int) -> list[TokenSequence]:
        """The target's own answers to a round's prompts, whoever the recipe says writes them."""
        if self._recipe.source == "target":
            return self.sequences(round_, None)
        return self._usable(self._answers(self._prompts.of_round(round_), round_, None))

    def _written(self, round_: int, draft: Path | None) -> list[TokenSequence]:
        prompts, recipe = self._prompts.of_round(round_), self._recipe
        if recipe.source == "fixed":
            whole = [prompt.with_answer() for prompt in prompts]
            longest = recipe.answer_tokens
            return self._usable(
                [TokenSequence(s.tokens[: s.prompt_tokens + longest], s.prompt_tokens) for s in whole]
            )
        writes = order.from_draft(len(prompts), recipe.from_draft, round_, recipe.seed)
        by_draft = [prompt for prompt, own in zip(prompts, writes, strict=True) if own]
        by_target = [prompt for prompt, own in zip(prompts, writes, strict=True) if not own]
        return self._usable(self._answers(by_target, round_, None) + self._answers(by_draft, round_, draft))

    def _answers(self, prompts: Sequence[Prompt], round_: int, draft: Path | None) -> list[TokenSequence]:
        if not prompts:
            return []
        self._local.use_draft(draft)
        write = self._local.generate if draft is None else self._local.generate_from_draft
        who, temperatures = "target" if draft is None else "draft", self._recipe.temperatures
        answers: list[TokenSequence] = []
        for turn, temperature in enumerate(temperatures):
            if asked := [prompt.tokens for prompt in prompts[turn :: len(temperatures)]]:
                seed = derive_seed(self._recipe.seed, "answers", round_, who, turn)
                answers += write(
                    asked, temperature=temperature, max_tokens=self._recipe.answer_tokens, seed=seed
                )
        return answers

    @staticmethod
    def _usable(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        usable = [sequence for sequence in sequences if sequence.answer_tokens]
        if not usable:
            raise DataError(
                "not one answer of this round has a token; see that the prompts are what they should be"
            )
        return usable


class EngineJudge:
    """Measures through the serving engine, on held-out prompts."""

    def __init__(self, recipe: Recipe, local: LocalEngine, held_out: Sequence[Prompt]) -> None:
        self._recipe, self._local, self._held_out = recipe, local, held_out

    def measure(self, draft: Path) -> Mapping[str, Any]:
        """See ``parts.Judge``."""
        recipe = self._recipe
        self._local.use_draft(draft)
        result = self._local.measure(
            [prompt.tokens for prompt in self._held_out],
            temperature=recipe.eval_temperature,
            max_tokens=recipe.eval_tokens,
            draft_tokens=recipe.draft_tokens,
            seed=recipe.seed,
        )
        self._local.use_draft(None)
        return {
            "dataset": f"{Path(recipe.prompts).name}, held out",
            "prompts": len(self._held_out),
            "temperature": recipe.eval_temperature,
            "draft_tokens": recipe.draft_tokens,
            # Figures that nothing was counted for are left at what they would be without a draft.
            "tau": result.tau if isfinite(result.tau) else 1.0,
            "alpha": result.alpha if isfinite(result.alpha) else 0.0,
            "alpha_per_position": [alpha for alpha in result.alpha_per_position if isfinite(alpha)],
            "histogram": list(result.histogram),
            "n_tokens": result.n_tokens,
        }
