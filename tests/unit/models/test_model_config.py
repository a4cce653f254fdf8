"""Configurations that make no sense are refused in one line, before anything is made of them."""

import math
from typing import Any

import pytest
from tiny import tiny_hf_config

from paceline.server.errors import ArtifactError, UnsupportedModelError, UserError
from paceline.server.models.config import parse_model_config

REFUSED: list[tuple[dict[str, Any], type[UserError], str]] = [
    (
        {"num_hidden_layers": 10**30},
        ArtifactError,
        "num_hidden_layers must be a whole number from 1 to 10000",
    ),
    ({"num_hidden_layers": 0}, ArtifactError, "num_hidden_layers must be a whole number"),
    ({"head_dim": 2**40}, ArtifactError, "head_dim must be"),
    ({"num_key_value_heads": -1}, ArtifactError, "num_key_value_heads must be"),
    ({"hidden_size": True}, ArtifactError, "hidden_size must be"),
    ({"vocab_size": "300"}, ArtifactError, "vocab_size must be .* but is '300'"),
    ({"intermediate_size": math.nan}, ArtifactError, "intermediate_size must be .* but is nan"),
    ({"architectures": 3}, ArtifactError, "architectures must be a list of names, but is 3"),
    ({"model_type": ["llama"]}, UnsupportedModelError, "model type"),
    ({"quantization_config": "gptq"}, UnsupportedModelError, "quantization 'gptq'"),
    ({"attention_bias": "float32"}, ArtifactError, "not a valid llama configuration"),
    ({"rms_norm_eps": "small"}, ArtifactError, "not a valid llama configuration"),
    ({"reads_target_state": 1}, ArtifactError, "reads_target_state must be true or false"),
    ({"rope_scaling": [1, 2]}, ArtifactError, "not a valid llama configuration"),
]


@pytest.mark.parametrize(
    ("fields", "kind", "says"), REFUSED, ids=[next(iter(fields)) for fields, _, _ in REFUSED]
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], kind: type[UserError], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        parse_model_config(tiny_hf_config("llama", **fields), where="here/config.json")
    assert str(caught.value).isprintable()
    assert "here/config.json" in str(caught.value)


def test_a_message_is_one_printable_line_whatever_it_quotes() -> None:
    assert str(ArtifactError("no tensor a\nb\x00\ud800 é 字")) == "no tensor a\\nb\\x00\\ud800 é 字"
    parse_model_config(tiny_hf_config("llama", head_dim=None))
