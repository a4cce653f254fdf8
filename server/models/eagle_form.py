"""A draft that reads its target's states, as the checkpoint that vLLM's ``eagle`` method loads.

Owns tensor names and configuration of that form (EAGLE-1, arXiv:2401.15077; vLLM's ``llama_eagle.py``): names without
``model.`` before them, no head, as vLLM takes the target's. Its only architecture for blocks like these is Llama; Qwen2
blocks are Llama blocks with biases on q, k and v. It has no row for the first token: ``eagle_start`` makes up for it.
"""

from typing import TYPE_CHECKING, Any

from paceline.server.errors import ArtifactError
from paceline.server.models.config import EAGLE_ARCHITECTURE, EMBEDDING, FC, HEAD, READS_STATE

if TYPE_CHECKING:
    import torch

    from paceline.server.models.checkpoint import Checkpoint
    from paceline.server.models.native_form import NativeCheckpoint

#: model_type of the draft -> what it takes to say the same as a Llama configuration.
_AS_LLAMA: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {"attention_bias": False, "qkv_bias": True}}
_QWEN_ONLY = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def eagle_config(checkpoint: "NativeCheckpoint") -> dict[str, Any]:
    """``config.json`` of the exported draft.

    Raises:
        ArtifactError: blocks that vLLM has no such draft for.
    """
    config = checkpoint.hf_config
    extra = _AS_LLAMA.get(config["model_type"])
    if extra is None or config.get("use_sliding_window"):
        raise ArtifactError(
            f"{checkpoint.path} cannot be exported standalone: vLLM's eagle method runs blocks of the types "
            f"{' and '.join(_AS_LLAMA)} without sliding windows, and its type is {config['model_type']}"
        )
    kept = {
        k: v for k, v in config.items() if k not in (READS_STATE, "dtype", *(_QWEN_ONLY if extra else ()))
    }
    plain = {"architectures": [EAGLE_ARCHITECTURE], "model_type": "llama", "torch_dtype": "bfloat16"}
    return kept | extra | plain | {"tie_word_embeddings": False}


def eagle_tensors(checkpoint: "NativeCheckpoint", target: "Checkpoint") -> dict[str, "torch.Tensor"]:
    """Every tensor of the exported draft, bf16.

    Raises:
        ArtifactError: the draft's head is not the target's.
    """
    import torch

    from paceline.server.models.eagle_start import corrected_fc

    _check_head(checkpoint, target)
    names = [name for name in checkpoint.tensor_names() if name not in (HEAD, FC)]
    tensors = {name: checkpoint.tensor(name) for name in names} | {FC: corrected_fc(checkpoint, target)}
    return {name.removeprefix("model."): tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def _check_head(checkpoint: "NativeCheckpoint", target: "Checkpoint") -> None:
    import torch

    from paceline.server.models.native_form import head_name

    tied = checkpoint.hf_config.get("tie_word_embeddings") and checkpoint.draft_vocab is None
    own, theirs = checkpoint.tensor(EMBEDDING if tied else HEAD), target.tensor(head_name(target))
    if checkpoint.draft_vocab is not None:
        theirs = theirs[checkpoint.draft_vocab.long()]
    if not torch.equal(own.to(torch.bfloat16), theirs.to(torch.bfloat16)):
        raise ArtifactError(
            f"{checkpoint.path} cannot be exported standalone: it has a head of its own, and vLLM's eagle method uses "
            "the target's; train one that shares lm_head.weight with the target"
        )
