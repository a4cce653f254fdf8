"""One training sequence: token ids, and where the prompt ends."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt and the answer to it.

    Attributes:
        tokens: all ids, prompt first.
        prompt_tokens: how many of them are the prompt, at least 1; what follows is learnt.
    """

    tokens: tuple[int, ...]
    prompt_tokens: int

    def __post_init__(self) -> None:
        assert 1 <= self.prompt_tokens <= len(self.tokens), (
            f"{self.prompt_tokens} prompt tokens of {len(self.tokens)}"
        )

    @property
    def answer(self) -> tuple[int, ...]:
        """The ids after the prompt."""
        return self.tokens[self.prompt_tokens :]

    @property
    def answer_tokens(self) -> int:
        """How many ids follow the prompt."""
        return len(self.tokens) - self.prompt_tokens
