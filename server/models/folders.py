"""Writing model folders: complete or not at all, weights and configuration, tokenizer.

Knows nothing of what the weights are.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.server.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    import torch

#: What makes up a tokenizer on disk, beside the weights.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@contextmanager
def complete_or_nothing(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its place when the block ends well.

    Raises:
        ConfigError: nothing can be written there.
        ArtifactError: writing failed half-way; what was there still is.
    """
    parent = output.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".{output.name}-"))
    except OSError as error:
        raise ConfigError(f"cannot write to {parent}: {error.strerror}") from error
    old = temporary.with_name(f"{temporary.name}-old")
    try:
        yield temporary
        temporary.chmod(0o755)
        if output.exists():
            output.rename(old)
        temporary.rename(output)
    except OSError as error:
        raise ArtifactError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        if old.exists() and not output.exists():
            old.rename(output)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, "torch.Tensor"]) -> None:
    """Write ``config.json`` and ``model.safetensors``; tensors may live anywhere and share memory.

    Raises:
        ArtifactError: the weights cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # as the other files; safetensors keeps it private
    except SafetensorError as error:  # a full disk, mostly
        raise ArtifactError(f"cannot write the weights: {error}") from error


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer of a Hugging Face folder, or of a ``.gguf`` file in its converted form."""
    if source.is_file():
        from paceline.server.models.gguf_tokenizer import converted_folder

        source = converted_folder(source)
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
