"""A whole decoder of the Llama family that can be trained, and shows the output of every block.

Parameters have the names of Hugging Face checkpoints. The arithmetic is that of ``distill.blocks``; rows are packed.
Linears and norms are trained, embedding and head unless they are to stay as they are; teachers are frozen.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from paceline.draftmodels.distill.blocks import Angles, Block, Positions
from paceline.draftmodels.distill.layout import Padded
from paceline.draftmodels.finetune.attention import CausalAttend, QueryBlock, query_blocks
from paceline.draftmodels.finetune.batch import Batch
from paceline.server.models.checkpoint import Checkpoint
from paceline.server.models.config import EMBEDDING, HEAD, ModelConfig
from paceline.server.models.tensors import CheckedTensors


class Decoder(nn.Module):
    """A decoder with the given tensors.

    Args:
        config: shapes.
        tensors: every tensor of ``config.tensor_names()``.
        checkpointing: keep only what blocks read for the backward pass, and compute the rest again.
    """

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], *, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config, self._checkpointing = config, checkpointing
        with torch.device("meta"):
            self.model = nn.Module()
            self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = [Block(config) for _ in range(config.num_layers)]
            self.model.layers = nn.ModuleList(self.layers)
            self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_eps)
            if not config.tied_head:
                self.lm_head = nn.Linear(config.hidden_size, config.head_rows, bias=False)
        self._positions = Positions(config)
        self.load_state_dict(dict(tensors), assign=True)

    @property
    def head(self) -> Tensor:
        """[vocabulary, hidden]."""
        return self.get_parameter(EMBEDDING if self.config.tied_head else HEAD)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by checkpoint name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, batch: Batch) -> list[Tensor]:
        """The output of each block, the last one after the final norm: fp32 [rows, hidden] each."""
        x = F.embedding(batch.tokens, self.get_parameter(EMBEDDING)).float()
        angles = self._positions.angles(batch.positions)
        blocks = self._query_blocks(batch.place.width, x.device)
        states = []
        for layer, window in zip(self.layers, self.config.sliding_windows, strict=True):
            arguments = (layer, x, angles, batch.place, blocks[window])
            if self._checkpointing and torch.is_grad_enabled():
                x = checkpoint(_through, *arguments, use_reentrant=False)
            else:
                x = _through(*arguments)
            states.append(x)
        states[-1] = self.get_submodule("model.norm")(x)
        return states

    def _query_blocks(self, width: int, device: torch.device) -> dict[int | None, list[QueryBlock]]:
        """For each window that a layer has."""
        narrow = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if narrow else torch.float32
        return {
            window: query_blocks(width, window, dtype, device) for window in set(self.config.sliding_windows)
        }


def _through(layer: Block, x: Tensor, angles: Angles, place: Padded, blocks: Sequence[QueryBlock]) -> Tensor:
    normed = layer.normed(x)
    keys, values = layer.keys_values(normed, angles)
    y: Tensor = layer(x, normed, angles, CausalAttend(place, keys, values, blocks))
    return y


def make_trained(
    source: Checkpoint,
    config: ModelConfig,
    device: torch.device,
    *,
    train_embedding: bool,
    checkpointing: bool,
) -> Decoder:
    """A decoder to train, in fp32; a sparse student's weights are dense with zeros.

    Raises:
        ArtifactError: a tensor is missing or has another shape than the configuration says.
    """
    fetch = CheckedTensors(source, config, device=device)
    # Copies: what is read may be a view of the file, and steps write in place.
    tensors = {name: fetch(name).clone() for name in config.tensor_names()}
    model = Decoder(config, tensors, checkpointing=checkpointing)
    if not train_embedding:
        for name in {EMBEDDING, HEAD} & set(config.tensor_names()):
            model.get_parameter(name).requires_grad_(False)
    return model


def make_frozen(source: Checkpoint, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A frozen decoder; matrices in the type that they are multiplied in, vectors in fp32.

    Raises:
        ArtifactError: a tensor is missing or has another shape than the configuration says.
    """
    fetch = CheckedTensors(source, config, device=device)
    tensors = {name: fetch(name) for name in config.tensor_names()}
    narrow = {name: tensor.to(dtype) if tensor.dim() > 1 else tensor for name, tensor in tensors.items()}
    return Decoder(config, narrow).eval().requires_grad_(False)
