"""What is counted of two servers to compare them: accepted draft tokens, and how sampled answers begin."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import campaign
import httpx
import numpy as np
import numpy.typing as npt
import openai
from engine_servers import MODEL, Served
from served_process import PATIENCE_SECONDS

PROMPTS = Path(__file__).parents[1] / "draftmodels" / "evaluate" / "prompts.jsonl"
#: It goes on in a few likely ways, so that their shares say something with some hundred answers.
_PROMPT = "The capital of France is"
#: Texts that both samples together hold less often share a column.
_LEAST = 20


def acceptance(served: Served, temperature: float, least: int) -> tuple[int, int]:
    """Drafted and accepted tokens of answers to the built-in prompts, at least ``least`` drafted ones; 16 at a time."""
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    drafted = accepted = asked = 0
    with httpx.Client(timeout=PATIENCE_SECONDS) as http, ThreadPoolExecutor(16) as pool:

        def ask(prompt: str) -> dict[str, int]:
            body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}
            body |= {"temperature": temperature, "max_tokens": 160 if campaign.FULL else 48}
            answer = http.post(served.url + "/v1/chat/completions", json=body)
            return cast(dict[str, int], answer.json()["metrics"]["speculative_decoding"])

        while drafted < least:
            for figures in pool.map(ask, [prompts[i % len(prompts)] for i in range(asked, asked + 16)]):
                drafted += figures["num_draft_tokens"]
                accepted += figures["num_accepted_draft_tokens"]
            asked += 16
    return drafted, accepted


def beginnings(client: openai.OpenAI, requests: int, **sampling: Any) -> Counter[str]:
    """The first four tokens of 64 answers per request; with a draft three of them come from verified blocks."""
    drawn: Counter[str] = Counter()
    for _ in range(requests):
        answer = client.completions.create(model=MODEL, prompt=_PROMPT, n=64, max_tokens=4, **sampling)
        drawn.update(choice.text for choice in answer.choices)
    return drawn


def contingency(*samples: Counter[str]) -> npt.NDArray[np.int64]:
    """Counts [samples, texts]; the last column has all texts that are too rare for one of their own."""
    together = sum(samples, Counter[str]())
    common = [text for text, count in together.items() if count >= _LEAST]
    rows = [[*(drawn[t] for t in common), drawn.total() - sum(drawn[t] for t in common)] for drawn in samples]
    table = np.array(rows, dtype=np.int64)
    return table[:, table.sum(axis=0) > 0]
