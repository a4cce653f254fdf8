"""Model files that only the peers of the side-by-side bench need, made once and cached.

Owns the Q8_0 file for llama.cpp (requantized from the GGUF file that everyone starts from) and the bf16 folder in
Hugging Face form for vLLM and transformers. Files are named after the source's SHA-256 and appear complete or not
at all. It must not know how contenders run. Needs the ``server`` extra (gguf, numpy); imported when called.
"""

import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from paceline.clients.peers import PACELINE, PeerError

#: Values per Q8_0 block; rows must be a multiple of it.
Q8_0_BLOCK = 32


def bench_cache() -> Path:
    """Where made files lie: ``bench/`` in the folder that ``paceline`` itself caches in."""
    configured = os.environ.get("PACELINE_CACHE")
    return (Path(configured).expanduser() if configured else Path.home() / ".cache" / "paceline") / "bench"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _target(source: Path, suffix: str) -> Path:
    """Cache path of what is made from ``source``; its parent exists afterwards."""
    folder = bench_cache()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{source.stem}-{_sha256(source)[:12]}-{suffix}"


def quant_name(gguf_file: Path) -> str:
    """How llama.cpp calls the file's quantization, such as ``Q4_1`` or ``Q4_K_M``."""
    import gguf

    field = gguf.GGUFReader(str(gguf_file)).get_field("general.file_type")
    if field is None:
        return "gguf"
    return str(gguf.LlamaFileType(field.contents()).name).removeprefix("MOSTLY_")


def block_count(gguf_file: Path) -> int:
    """Decoder layers of a GGUF file."""
    import gguf

    reader = gguf.GGUFReader(str(gguf_file))
    architecture = reader.get_field("general.architecture")
    count = reader.get_field(f"{architecture.contents()}.block_count") if architecture else None
    if count is None:
        raise PeerError(f"{gguf_file}: no number of layers in the file")
    return int(count.contents())


def q8_0_file(source: Path) -> Path:
    """The source in Q8_0: all matrices requantized, vectors in fp32, metadata and tokenizer copied.

    Raises:
        PeerError: rows that Q8_0 cannot hold, or no room.
    """
    target = _target(source, "Q8_0.gguf")
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            part = Path(folder) / target.name
            try:
                write_q8_0(source, part)
            except OSError as error:
                raise PeerError(f"cannot write {target}: {error.strerror or error}") from error
            part.replace(target)
    return target


def write_q8_0(source: Path, target: Path) -> None:
    """Requantize; see ``q8_0_file``. Memory: one tensor in fp32 beside the whole result."""
    import gguf

    reader = gguf.GGUFReader(str(source))
    architecture = reader.get_field("general.architecture")
    if architecture is None:
        raise PeerError(f"{source}: names no architecture")
    writer = gguf.GGUFWriter(target, architecture.contents())
    _copy_metadata(reader, writer)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values.astype("float32"))
            continue
        if values.shape[-1] % Q8_0_BLOCK:
            raise PeerError(f"{source}: rows of {tensor.name} are no multiple of {Q8_0_BLOCK}: no Q8_0")
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_metadata(reader: Any, writer: Any) -> None:
    """Every key but those that describe the container or the quantization."""
    import gguf

    own = {"general.architecture", "general.alignment", "general.file_type", "general.quantization_version"}
    for field in reader.fields.values():
        if field.name in own or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def hf_folder(source: Path) -> Path:
    """A plain bf16 folder of the same model; a source that is a folder is taken as it is.

    Raises:
        PeerError: ``paceline init-draft``, which writes it (all layers kept), failed.
    """
    if source.is_dir():
        return source
    target = _target(source, "bf16")
    if not target.exists():
        layers = ",".join(map(str, range(block_count(source))))
        command = (*PACELINE, "init-draft", str(source), "--layers", layers, "-o", str(target), "--json")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PeerError(f"bf16 folder of {source.name}: {done.stderr.strip() or done.stdout.strip()}")
    return target


def pull(model: str) -> Path:
    """Where a model lies; a catalog name is fetched through ``paceline pull`` first.

    Raises:
        PeerError: it cannot be had; carries the command's own line.
    """
    if Path(model).exists():
        return Path(model).resolve()
    done = subprocess.run([*PACELINE, "pull", model, "--json"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PeerError(f"paceline pull {model}: {done.stderr.strip() or done.stdout.strip()}")
    return Path(json.loads(done.stdout[done.stdout.index("{") :])["path"])
