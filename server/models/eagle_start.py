"""The first row of a draft that reads states, made up for in the ``eagle`` form, where vLLM leaves it out.

Natively row i joins the embedding of token i with the target's state at i - 1, and row 0 the first token's embedding
with zeros. The draft's attention rests on that row wherever it has nothing better to look at (an attention sink). The
first row in vLLM is our row 1, and nothing takes the place of row 0: the shipped draft lost a third of its accepted
tokens.

The target's state h_0 at the first token is unlike all others. So ``fc`` gets a correction of rank one, on its half
that reads states, that turns vLLM's first row, fc [e(x_1), h_0], into ours, fc [e(x_0), 0], and leaves the other rows
nearly as they were. Shapes: joined rows [rows, 2 * hidden], states [rows, hidden], fp32. Knows nothing of files.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paceline.server.errors import InvalidRequestError
from paceline.server.models.config import EMBEDDING, FC, parse_model_config
from paceline.server.models.quality import calibration_text, split
from paceline.server.models.tensors import total_bytes

if TYPE_CHECKING:
    from paceline.server.models.checkpoint import Checkpoint
    from paceline.server.models.native_form import NativeCheckpoint
    from paceline.server.models.tokenizer import HfTokenizer

_log = logging.getLogger(__name__)
#: Targets with more bytes in fp32 are not run for it.
_MOST_BYTES = 32 * 2**30
#: How many texts of which length: conversations, which start as most requests do, and bare text.
_CHATS, _CHAT_TOKENS = 8, 64
_BARE, _BARE_TOKENS = 24, 32
#: Ridge, as a share of the mean square of an entry of the states; 0.1 to 10 gave the same acceptance.
_RIDGE = 0.1


def corrected_fc(checkpoint: "NativeCheckpoint", target: "Checkpoint") -> Tensor:
    """``fc`` for vLLM, fp32 [hidden, 2 * hidden].

    Args:
        checkpoint: a draft that reads states.
        target: what it drafts for; run on 1,300 tokens of the built-in text.
    """
    fc = checkpoint.tensor(FC).float()
    config = parse_model_config(target.hf_config, where=str(target.path))
    size = total_bytes(config)
    if size > _MOST_BYTES:
        _log.warning(
            "%s: its target is too large to be run here (%.0f GB in fp32), so that the row that vLLM leaves out is not "
            "made up for; the draft will accept less there than natively",
            checkpoint.path,
            size / 1e9,
        )
        return fc
    from paceline.server.models.tokenizer import load_tokenizer

    chats, bare = _texts(load_tokenizer(checkpoint.path), config.vocab_size)
    embedding, model = checkpoint.tensor(EMBEDDING).float(), _decoder(target)
    starts = list(_joined(chats or bare, embedding, model))
    rest = list(_joined(bare, embedding, model)) if chats else []
    first = torch.stack([joined[0] for _, joined in starts])
    native = torch.stack([F.pad(embedded, (0, fc.shape[0])) for embedded, _ in starts])
    others = torch.cat([joined[1:, fc.shape[0] :] for _, joined in starts + rest])
    return fc + correction(fc, native, first, others)


def correction(fc: Tensor, native: Tensor, first: Tensor, others: Tensor) -> Tensor:
    """What to add to ``fc``, [hidden, 2 * hidden]: zeros for embeddings, d u' for states.

    d is what vLLM's first row lacks on average, and u the vector with u' h_0 = 1 that has the smallest mean square on
    the other states: u ~ (C + ridge)^-1 h_0 with C their second moment.

    Args:
        native: our row 0 of some texts, [texts, 2 * hidden].
        first: vLLM's first row of the same texts, [texts, 2 * hidden].
        others: states of all but first tokens, [rows, hidden].
    """
    hidden = fc.shape[0]
    missing = ((native - first) @ fc.T).mean(0)
    state = first[:, hidden:].mean(0)
    moment = others.T @ others / len(others)
    ridge = _RIDGE * moment.diagonal().mean()
    direction = torch.linalg.solve(moment + ridge * torch.eye(hidden), state)
    return F.pad(torch.outer(missing, direction / (direction @ state)), (hidden, 0))


def _texts(tokenizer: "HfTokenizer", vocab_size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of conversations, none if the tokenizer has no template for them, and of bare text."""
    text = calibration_text()
    known = [i for i in tokenizer.encode(text, add_special_tokens=False) if i < vocab_size]
    bare = split(known, _BARE_TOKENS)
    chats: list[list[int]] = []
    for paragraph in text.split("\n\n")[:_CHATS] if tokenizer.has_chat_template else ():
        try:
            ids = tokenizer.apply_chat_template([{"role": "user", "content": paragraph}])
        except InvalidRequestError:  # a template that wants something else than a question
            break
        chats.append([i for i in ids if i < vocab_size][:_CHAT_TOKENS])
    return chats, bare[:: max(1, len(bare) // _BARE)][:_BARE]


@torch.inference_mode()
def _joined(
    texts: Sequence[Sequence[int]], embedding: Tensor, model: nn.Module
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each text the first token's embedding [hidden], and vLLM's rows [tokens - 1, 2 * hidden]."""
    for ids in texts:
        states = model(torch.tensor([list(ids)])).last_hidden_state[0]
        embedded = F.embedding(torch.tensor(list(ids)), embedding)
        yield embedded[0], torch.cat((embedded[1:], states[:-1]), dim=1)


def _decoder(target: "Checkpoint") -> nn.Module:
    """The target by transformers, fp32; it returns states after the final norm."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**{k: v for k, v in target.hf_config.items() if k != "torch_dtype"})
    model: nn.Module = AutoModel.from_config(config, dtype=torch.float32).eval()
    names = [name for name in target.tensor_names() if name.startswith("model.")]
    tensors = {name.removeprefix("model."): target.tensor(name).float() for name in names}
    model.load_state_dict(tensors, strict=False)
    return model
