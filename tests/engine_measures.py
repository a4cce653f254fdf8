"""What is counted of two servers to compare them: accepted draft tokens, and how sampled answers begin."""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import campaign
import httpx
import numpy as np
import numpy.typing as npt
import openai
from engine_servers import MODEL, Engine, Served, client_of
from served_process import PATIENCE_SECONDS

PROMPTS = Path(__file__).parents[1] / "draftmodels" / "evaluate" / "prompts.jsonl"
#: What a request says to be served without a draft; to vLLM nothing, there it must come alone (``SCHEDULE``).
UNDRAFTED: dict[Engine, dict[str, Any]] = {"native": {"speculation": {"enabled": False}}, "vllm": {}}
#: Prompts whose greedy tokens are the likeliest by 0.3 nats and more: near ties fall as the rows of a batch happen to
#: be rounded, which in vLLM depends on their company.
CERTAIN = (
    "1, 2, 3, 4, 5, 6,",
    "2, 4, 6, 8, 10, 12,",
    "100, 99, 98, 97, 96,",
    "<ul>\n<li>One</li>\n<li>Two</li>\n",
)
#: It goes on in a few likely ways, so that their shares say something with some hundred answers.
_PROMPT = "The capital of France is"
#: Texts that both samples together hold less often share a column.
_LEAST = 20


@dataclass(frozen=True)
class Rate:
    """Accepted of drafted tokens, [answers] each: tokens of one answer are accepted together more often than not."""

    drafted: npt.NDArray[np.int64]
    accepted: npt.NDArray[np.int64]

    @property
    def value(self) -> float:
        return float(self.accepted.sum() / self.drafted.sum())

    @property
    def error(self) -> float:
        """Standard error, of a ratio of sums over answers."""
        residuals = self.accepted - self.value * self.drafted
        return float(np.sqrt((residuals**2).sum()) / self.drafted.sum())

    def __str__(self) -> str:
        counts = f"{self.accepted.sum()} of {self.drafted.sum()} drafted tokens accepted"
        return f"{counts}, {self.value:.4f} +- {self.error:.4f}"


def acceptance(served: Served, temperature: float, least: int) -> Rate:
    """Of answers to the built-in prompts, at least ``least`` drafted tokens; 16 answers at a time."""
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    counts: list[tuple[int, int]] = []
    with httpx.Client(timeout=PATIENCE_SECONDS) as http, ThreadPoolExecutor(16) as pool:

        def ask(prompt: str) -> dict[str, int]:
            body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}
            body |= {"temperature": temperature, "max_tokens": 160 if campaign.FULL else 48}
            answer = http.post(served.url + "/v1/chat/completions", json=body)
            return cast(dict[str, int], answer.json()["metrics"]["speculative_decoding"])

        while sum(drafted for drafted, _ in counts) < least:
            asked = [prompts[i % len(prompts)] for i in range(len(counts), len(counts) + 16)]
            for figures in pool.map(ask, asked):
                counts.append((figures["num_draft_tokens"], figures["num_accepted_draft_tokens"]))
    drafted, accepted = np.array(counts, dtype=np.int64).T
    return Rate(drafted, accepted)


def draft_tokens(answer: openai.types.Completion) -> int:
    """How many an answer took; one that could have none says nothing."""
    figures = (answer.model_extra or {}).get("metrics", {}).get("speculative_decoding", {})
    return cast(int, figures.get("num_draft_tokens", 0))


def greedy_texts(
    served: Served, prompts: Sequence[str], together: int, **extra: Any
) -> tuple[list[str], int]:
    """Greedy answers to ``prompts``, so many at a time, and how many draft tokens they took."""
    with client_of(served) as client, ThreadPoolExecutor(together) as pool:

        def ask(prompt: str) -> tuple[str, int]:
            answer = client.completions.create(
                model=MODEL, prompt=prompt, temperature=0, max_tokens=48, extra_body=extra
            )
            return answer.choices[0].text, draft_tokens(answer)

        answers = list(pool.map(ask, prompts))
    return [text for text, _ in answers], sum(drafted for _, drafted in answers)


def beginnings(
    client: openai.OpenAI, requests: int, choices: int, temperature: float, **extra: Any
) -> tuple[Counter[str], int]:
    """The first four tokens of so many answers per request, and how many draft tokens they took.

    With a draft three of the four come from verified blocks.
    """
    drawn: Counter[str] = Counter()
    drafted = 0
    for _ in range(requests):
        answer = client.completions.create(
            model=MODEL, prompt=_PROMPT, n=choices, max_tokens=4, temperature=temperature, extra_body=extra
        )
        drawn.update(choice.text for choice in answer.choices)
        drafted += draft_tokens(answer)
    return drawn, drafted


def contingency(*samples: Counter[str]) -> npt.NDArray[np.int64]:
    """Counts [samples, texts]; the last column has all texts that are too rare for one of their own."""
    together = sum(samples, Counter[str]())
    common = [text for text, count in together.items() if count >= _LEAST]
    rows = [[*(drawn[t] for t in common), drawn.total() - sum(drawn[t] for t in common)] for drawn in samples]
    table = np.array(rows, dtype=np.int64)
    return table[:, table.sum(axis=0) > 0]
