"""What is calibrated and measured on: sequences from a file, or written by the target itself.

A ``.jsonl`` file is read as for ``train-draft``: prompts through the target's chat template, with the file's answers
where it has some; then perplexity counts answer tokens only, as a template's own would flatter it. Any other file is
running text, cut into windows; perplexity counts all of it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from paceline.draftmodels.data.prompts import Prompt, read_prompts, split_held_out
from paceline.draftmodels.data.seeds import derive_seed, epoch_order
from paceline.draftmodels.data.self_prompts import self_prompts
from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.local_engine import LocalEngine
from paceline.draftmodels.prune.config import SELF, Recipe
from paceline.server.engine.interface import Tokenizer
from paceline.server.errors import ConfigError, DataError

_log = logging.getLogger(__name__)
#: Prompts that the target writes have a quarter of a sequence, and at least this where that leaves half of it.
_PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Texts:
    """Sequences, each of at least two tokens, and no text in both.

    Attributes:
        calibration: what the layers are run on.
        held_out: what perplexity is measured on; tokens after the prompt count.
        measured_on: what ``held_out`` is, in words.
    """

    calibration: list[TokenSequence]
    held_out: list[TokenSequence]
    measured_on: str


def read_texts(recipe: Recipe, target: str, tokenizer: Tokenizer, context_length: int) -> Texts:
    """The texts of a recipe; the same for the same seed, whatever the method.

    Raises:
        DataError: a file that cannot be read, or without enough text.
        ConfigError: sequences longer than the target's context, or a target that cannot write any.
    """
    if recipe.sequence_tokens > context_length:
        raise ConfigError(
            f"--sequence-tokens: {recipe.sequence_tokens} is more than the target's context of {context_length}"
        )
    held_out = 0 if recipe.measure is not None else recipe.held_out
    if recipe.calibration == SELF:
        written = _written(recipe, target, recipe.samples + held_out)
        found, name = (written[held_out:], written[:held_out]), "the target's own text"
    else:
        found, name = _of_file(Path(recipe.calibration), recipe, tokenizer, held_out), recipe.calibration
    calibration = _some(found[0], recipe.samples, recipe, "calibrate on", "--samples")
    if recipe.measure is None:
        return Texts(calibration, found[1], f"{Path(name).name}, held out")
    other, _ = _of_file(Path(recipe.measure), recipe, tokenizer, 0)
    kept = _without(other, calibration)
    if not kept:
        raise DataError(f"--measure: all of {recipe.measure} is calibration text; name another file")
    chosen = _some(kept, recipe.held_out, recipe, "measure on", "--held-out")
    return Texts(calibration, chosen, Path(recipe.measure).name)


def _of_file(
    path: Path, recipe: Recipe, tokenizer: Tokenizer, held_out: int
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """(for calibration, held out)."""
    if path.suffix == ".jsonl":
        prompts = read_prompts(path, tokenizer)
        fitting = [prompt for prompt in prompts if len(prompt.tokens) < recipe.sequence_tokens]
        if len(fitting) < len(prompts):
            _log.info(
                "%s: %d of %d prompts leave no room in %d tokens and are left out",
                path,
                len(prompts) - len(fitting),
                len(prompts),
                recipe.sequence_tokens,
            )
        prompts = [prompt for prompt in fitting if len(prompt.tokens) > 1]
    else:
        prompts = [Prompt(window) for window in _windows(path, recipe.sequence_tokens, tokenizer)]
    if not prompts:
        raise DataError(f"{path} holds no text that can be used")
    training, kept = split_held_out(prompts, held_out, recipe.seed)
    return [_sequence(prompt, recipe) for prompt in training], [_sequence(prompt, recipe) for prompt in kept]


def _sequence(prompt: Prompt, recipe: Recipe) -> TokenSequence:
    if not prompt.answer:
        return TokenSequence(prompt.tokens, 1)
    whole = prompt.with_answer()
    return TokenSequence(whole.tokens[: recipe.sequence_tokens], whole.prompt_tokens)


def _windows(path: Path, length: int, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Running text in windows, each begun as the tokenizer begins a text; a short rest is dropped."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    begin = tuple(tokenizer.encode(""))
    tokens, room = tokenizer.encode(text, add_special_tokens=False), length - len(begin)
    windows = [(*begin, *tokens[at : at + room]) for at in range(0, len(tokens), room)]
    return [window for window in windows if len(window) >= min(length, 8)]


def _written(recipe: Recipe, target: str, count: int) -> list[TokenSequence]:
    """The target's own answers to its own prompts, or texts of its own where it has no chat template; T = 1."""
    local = LocalEngine(
        target,
        weights=recipe.weights or "auto",
        threads=recipe.threads,
        streams=min(32, count),
        device=recipe.device,
    )
    try:
        prompts = _own_prompts(local, recipe, count)
        longest = recipe.sequence_tokens - max(map(len, prompts))
        seed = derive_seed(recipe.seed, "calibration")
        texts = local.generate(prompts, temperature=1.0, max_tokens=longest, seed=seed)
    finally:
        local.close()
    usable = [text for text in texts if text.answer_tokens]
    if len(usable) < count:
        _log.warning("%d of %d texts of the target's own are empty", count - len(usable), count)
    return usable


def _own_prompts(local: LocalEngine, recipe: Recipe, count: int) -> list[tuple[int, ...]]:
    if local.tokenizer.has_chat_template:
        longest = min(max(recipe.sequence_tokens // 4, _PROMPT_TOKENS), recipe.sequence_tokens // 2)
        written = self_prompts(local, count, seed=recipe.seed, max_prompt_tokens=longest)
        return [prompt.tokens for prompt in written]
    begin = tuple(local.tokenizer.encode("")) or tuple(sorted(local.tokenizer.eos_ids)[:1])
    if not begin:
        raise ConfigError("--calibration: the target has no token to begin a text with; name a file")
    return [begin] * count


def _some(
    found: Sequence[TokenSequence], count: int, recipe: Recipe, purpose: str, flag: str
) -> list[TokenSequence]:
    """``count`` of them, in an order that hangs on the seed alone."""
    if len(found) < count:
        _log.warning("there are %d sequences to %s, not %s %d", len(found), purpose, flag, count)
    return [found[i] for i in epoch_order(len(found), recipe.seed, 0)[:count]]


def _without(found: Sequence[TokenSequence], others: Sequence[TokenSequence]) -> list[TokenSequence]:
    known = set(chain(other.tokens for other in others))
    return [sequence for sequence in found if sequence.tokens not in known]
