"""What one request of a measurement left behind; plain data between the passes and the figures."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """One verified draft block.

    Attributes:
        source: name of the proposer.
        overlaps: sum_v min(p, q) at the examined positions, those up to and including the first rejection; at T = 0
            1.0 for a match and 0.0 for none. None where it was not computed.
    """

    source: str
    drafted: int
    accepted: int
    overlaps: tuple[float, ...] | None = None

    @property
    def examined(self) -> int:
        """Positions that verification looked at."""
        return min(self.accepted + 1, self.drafted)


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt's answer in one pass.

    Attributes:
        prompt: index of the prompt.
        tokens: all committed tokens. The prompt's last forward commits the first of them.
        forwards: target forwards after that one.
        seconds: from submitting the request to its last event.
        blocks: verified draft blocks, in order; empty without speculation.
        text: of the tokens, without a stop text.
        decode_seconds: from the first commit to the last.
    """

    prompt: int
    category: str
    tokens: tuple[int, ...]
    forwards: int
    seconds: float
    blocks: tuple[Block, ...] = ()
    text: str = ""
    decode_seconds: float = 0.0

    @property
    def decoded(self) -> int:
        """Tokens that ``forwards`` committed."""
        return max(0, len(self.tokens) - 1)


@dataclass(frozen=True, slots=True)
class Pass:
    """All answers of one pass, in the order of the prompts, and its wall-clock seconds."""

    answers: tuple[Answer, ...]
    seconds: float
