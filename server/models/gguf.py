"""GGUF files read as Hugging Face checkpoints: names, row order and float values of the original model.

Owns the tensor side: GGUF names to Hugging Face names, undoing the q/k row permutation of llama files, and
dequantizing tensor by tensor through a memory map. ``gguf_config`` owns the metadata side.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, ReaderTensor, dequantize

from paceline.server.errors import ArtifactError
from paceline.server.models.config import unsupported
from paceline.server.models.gguf_config import ARCHITECTURES, Metadata, hf_config, rope_from_frequencies
from paceline.server.models.verified import file_sha256

#: GGUF name -> Hugging Face name, outside the layers.
_TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
#: Within ``blk.N.`` -> within ``model.layers.N.``; each with ``.weight`` or ``.bias``.
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: Not a weight: the inverse of the rope scaling factors, turned into configuration.
_ROPE_FREQUENCIES = "rope_freqs.weight"


class GgufCheckpoint:
    """An opened ``.gguf`` file; see ``checkpoint.Checkpoint``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = open_reader(path)
        metadata = Metadata(reader, path)
        self._tensors = _by_hf_name(reader, path)
        self.hf_config: dict[str, Any] = hf_config(metadata, set(self._tensors), self._vocab_size())
        frequencies = {tensor.name: tensor for tensor in reader.tensors}.get(_ROPE_FREQUENCIES)
        if frequencies is not None:
            factors = np.array(frequencies.data, dtype=np.float64)
            self.hf_config["rope_scaling"] = rope_from_frequencies(factors, self.hf_config, path)
        # The llama layout pairs neighbouring rows for rope where Hugging Face pairs the two halves of a head.
        self._permuted = metadata.architecture == "llama"

    def tensor_names(self) -> list[str]:
        """See ``Checkpoint.tensor_names``."""
        return sorted(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """See ``Checkpoint.tensor``."""
        if name not in self._tensors:
            raise ArtifactError(f"{self.path} has no tensor {name}")
        stored = self._tensors[name]
        data = stored.data
        if self._permuted and (".q_proj." in name or ".k_proj." in name):
            key = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            data = _rotate_half_rows(data, self.hf_config[key])
        return _to_torch(data, stored, self.path)

    def weights_sha256(self) -> str:
        """See ``Checkpoint.weights_sha256``."""
        return file_sha256(self.path)

    def _vocab_size(self) -> int:
        if "model.embed_tokens.weight" not in self._tensors:
            raise ArtifactError(f"{self.path} has no token_embd.weight")
        return int(self._tensors["model.embed_tokens.weight"].shape[-1])


def open_reader(path: Path) -> GGUFReader:
    """Header and tensor table of a GGUF file.

    Raises:
        ArtifactError: not a GGUF file, cut short or damaged.
    """
    try:
        reader = _QuickReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, struct.error) as error:
        # IndexError and struct.error: the header itself is cut; ValueError: tensor data is.
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{path} is not a GGUF file, or damaged, or cut short ({reason})") from error
    if reader.byte_order != "I":
        raise ArtifactError(f"{path} has the byte order of another kind of machine")
    return reader


class _QuickReader(GGUFReader):  # type: ignore[misc]
    """``GGUFReader`` without a Python object per vocabulary entry.

    The base class takes 2 to 9 s for the vocabulary and merges of the catalog's models, none of which is
    needed here. Were the base class to rename the method, files would only open slowly again.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if GGUFValueType(raw_type) != GGUFValueType.ARRAY:
            parts: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return parts
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        start = orig_offs + 12
        item = GGUFValueType(kind[0])
        types = [GGUFValueType.ARRAY, item]
        if item == GGUFValueType.STRING:
            return _skip_strings(self.data, start, int(count[0])) - orig_offs, [kind, count], [], types
        if item not in self.gguf_scalar_to_np:
            raise ValueError(f"arrays of {item.name} are not known")
        values = self._get(start, self.gguf_scalar_to_np[item], int(count[0]))
        return start + values.nbytes - orig_offs, [kind, count, values], [2], types


def _skip_strings(data: npt.NDArray[np.uint8], offset: int, count: int) -> int:
    buffer: Any = data
    view, length_of = memoryview(buffer), struct.Struct("<Q").unpack_from
    for _ in range(count):
        offset += 8 + length_of(view, offset)[0]
    return offset


def _by_hf_name(reader: GGUFReader, path: Path) -> dict[str, ReaderTensor]:
    named = {}
    for tensor in reader.tensors:
        if tensor.name == _ROPE_FREQUENCIES:
            continue
        name = hf_name(tensor.name)
        if name is None:
            raise unsupported(f"tensor {tensor.name} ({path.name})")
        named[name] = tensor
    return named


def hf_name(gguf_name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, None if the supported architectures have no such tensor."""
    if gguf_name in _TOP_LEVEL:
        return _TOP_LEVEL[gguf_name]
    match gguf_name.split("."):
        case ["blk", layer, leaf, "weight" | "bias" as kind] if layer.isdigit() and leaf in _IN_LAYER:
            return f"model.layers.{layer}.{_IN_LAYER[leaf]}.{kind}"
    return None


def _rotate_half_rows(data: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows (output features, first axis) from interleaved-rope order to rotate-half order."""
    # [heads * head_dim, ...] -> [heads, head_dim / 2, 2, ...] -> halves outermost within a head
    by_pair = data.reshape(heads, data.shape[0] // heads // 2, 2, *data.shape[1:])
    return np.ascontiguousarray(by_pair.swapaxes(1, 2)).reshape(data.shape)


def _to_torch(data: npt.NDArray[Any], stored: ReaderTensor, path: Path) -> torch.Tensor:
    if stored.tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return torch.from_numpy(np.array(data))
    if stored.tensor_type == GGMLQuantizationType.BF16:
        return torch.from_numpy(np.array(data)).view(torch.bfloat16)
    try:
        return torch.from_numpy(dequantize(data, stored.tensor_type))
    except NotImplementedError as error:
        raise unsupported(f"quantization {stored.tensor_type.name} ({path.name})") from error


__all__ = ["ARCHITECTURES", "GgufCheckpoint", "hf_name", "open_reader"]
