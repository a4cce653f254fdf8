"""transformers ``generate`` as a process: ``python -m paceline.clients.peer_transformers FOLDER DTYPE``.

Reads one JSON request per line (``messages``, ``max_tokens``), writes one JSON line with its timings: seconds
from reading the request to each generated token. Greedy, eager, one request at a time, end-of-sequence
ignored: what someone gets who calls ``generate`` in a script. Needs the ``server`` extra.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class TokenClock:
    """A ``generate`` streamer that notes when each token came; its first call brings the prompt."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, _ids: object) -> None:
        """Called by ``generate`` once for the prompt and once per token."""
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Called by ``generate`` when it is done."""


def load(model: Path, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint folder."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    kind = getattr(torch, DTYPES[dtype])
    lm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=kind)
    return lm.eval(), transformers.AutoTokenizer.from_pretrained(model)


def answer(lm: Any, tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Generate once and report the timings."""
    import torch

    started_s = time.perf_counter()
    encoded = tokenizer.apply_chat_template(
        request["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    clock = TokenClock()
    count = request["max_tokens"]
    with torch.inference_mode():
        lm.generate(
            **encoded,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            repetition_penalty=1.0,  # Some checkpoints' own defaults are not plain greedy.
            streamer=clock,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    times_s = [moment - started_s for moment in clock.times_s[1:]]
    return {"prompt_tokens": encoded["input_ids"].shape[1], "times_s": times_s}


def main(argv: list[str]) -> None:
    """Load ``argv[0]`` as ``argv[1]`` (fp32 or bf16), say ready, then answer stdin line by line."""
    # Whatever the libraries print must not get between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    lm, tokenizer = load(Path(argv[0]), argv[1])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        reply = answer(lm, tokenizer, json.loads(line))
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
