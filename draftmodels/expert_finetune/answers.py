"""How many held-out prompts an expert answers exactly, written greedily by the serving engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from paceline.draftmodels.data.sequences import TokenSequence
from paceline.draftmodels.local_engine import LocalEngine
from paceline.server.engine.interface import Tokenizer

#: Tokens that an answer may have beyond the longest right one: the same text can be written in more of them.
_SLACK_TOKENS = 8
_STREAMS = 16


@dataclass(frozen=True)
class ExactMatch:
    """Answers some prompts and compares with the right answers.

    Attributes:
        examples: prompts with their whole answers, at least one.
        weights: format that the engine runs, the stored one: nothing is rounded further.
    """

    examples: Sequence[TokenSequence]
    weights: Literal["bf16", "fp32"]
    threads: int
    device: Literal["cpu", "cuda"]

    def of(self, folder: Path) -> Mapping[str, Any]:
        """Figures of the model in ``folder``, ready for a manifest.

        An answer counts if its text is the right one (space around it aside) and it was ended, not cut.
        """
        engine = LocalEngine(
            folder,
            weights=self.weights,
            threads=self.threads,
            streams=_STREAMS,
            device=self.device,
            fleeting=True,
        )
        try:
            answers = engine.generate(
                [example.tokens[: example.prompt_tokens] for example in self.examples],
                temperature=0.0,
                max_tokens=max(example.answer_tokens for example in self.examples) + _SLACK_TOKENS,
                seed=0,
            )
            tokenizer = engine.tokenizer
        finally:
            engine.close()
        right = sum(is_match(a, e, tokenizer) for a, e in zip(answers, self.examples, strict=True))
        return {
            "exact_match": right / len(answers),
            "n_prompts": len(answers),
            "temperature": 0.0,
            "served_weights": self.weights,
        }


def is_match(answer: TokenSequence, example: TokenSequence, tokenizer: Tokenizer) -> bool:
    """Whether an answer is the example's text, and was ended."""
    ended = answer.tokens[-1] in tokenizer.eos_ids
    return ended and _text(answer, tokenizer) == _text(example, tokenizer)


def _text(sequence: TokenSequence, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(sequence.answer).strip()
