"""What is trained is what is served: the unrolled steps of a draft in training against transformers on its artifact,
which the kernels' and the engine's tests hold the serving side to."""

from typing import Any, NamedTuple

import pytest
import torch
from feature_oracle import FeatureOracle, target_states
from native_drafts import write_feature_draft

from paceline.draftmodels.distill.layout import lay_out
from paceline.draftmodels.distill.modules import FeatureDraft
from paceline.server.models.checkpoint import open_checkpoint
from paceline.server.models.config import parse_model_config, restricted
from paceline.server.models.native_form import NativeCheckpoint


class Sequence(NamedTuple):
    tokens: tuple[int, ...]
    prompt_tokens: int


@pytest.mark.parametrize("layers", [1, 2])
def test_unrolled_steps_equal_the_artifacts(layers: int, tiny_checkpoint: Any, tmp_path: Any) -> None:
    target = tiny_checkpoint("llama")
    ids = list(range(0, 300, 3))
    folder = write_feature_draft(tmp_path / "draft", target, layers=layers, ids=ids)
    checkpoint, oracle = NativeCheckpoint(folder, open_checkpoint(target)), FeatureOracle(folder, target)
    config = restricted(parse_model_config(checkpoint.hf_config), checkpoint.draft_vocab)
    draft = FeatureDraft(config, steps=3)
    assert set(draft.checkpoint_tensors()) == set(config.tensor_names())
    draft.load_state_dict({name: checkpoint.tensor(name) for name in config.tensor_names()})

    text = Sequence(tuple(range(5, 29)), 6)
    rows = len(text.tokens) - 1
    features = torch.cat((torch.zeros(1, config.hidden_size), target_states(target, text.tokens[: rows - 1])))
    outputs = draft(lay_out([text]), features)
    for step, output in enumerate(outputs, start=1):
        last = text.prompt_tokens - 1 + step - 1  # the first row with a history of so many draft steps
        assert len(output) == rows - last
        for row, state in zip(range(last, rows), output, strict=True):
            # The target has verified up to the row that is step - 1 rows before; from there on the draft is alone.
            known = features[: row - step + 2]
            for end in range(row - step + 2, row + 1):
                known = torch.cat((known, oracle.rows(text.tokens[:end], known)[1][-1:]))
            logits, states = oracle.rows(text.tokens[: row + 1], known)
            # Frozen embedding and head are bf16 in training.
            torch.testing.assert_close(state, states[-1], atol=0.03, rtol=0.03)
            torch.testing.assert_close(draft.head.float() @ state, logits[-1], atol=0.1, rtol=0.05)
    assert (outputs[0][2:] - outputs[2]).abs().mean() > 0.1
