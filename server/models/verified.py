"""Which files on disk are known to have which SHA-256, so that gigabytes are hashed once.

Beside a checked file lies ``NAME.sha256.json`` with the hash, size and modification time it was checked at; a
file that changed since is simply not known any more.
"""

import hashlib
import json
import os
import tempfile
from functools import cache
from pathlib import Path

CHUNK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file: the recorded one, or computed, at most once a process while it does not change."""
    known = known_sha256(path)
    if known is not None:
        return known
    stat = path.stat()
    return _computed_sha256(path.resolve(), stat.st_size, stat.st_mtime_ns)


@cache
def _computed_sha256(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_file(path)


def known_sha256(path: Path) -> str | None:
    """The file's SHA-256 if it was recorded and the file has not changed since."""
    try:
        record = json.loads(_record_path(path).read_text(encoding="utf-8"))
        stat = path.stat()
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or (record.get("size"), record.get("mtime_ns")) != (
        stat.st_size,
        stat.st_mtime_ns,
    ):
        return None
    sha256 = record.get("sha256")
    return sha256 if isinstance(sha256, str) else None


def record_sha256(path: Path, sha256: str) -> None:
    """Remember that ``path``, as it is now, has this hash."""
    stat = path.stat()
    record = {"sha256": sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    write_text_atomic(_record_path(path), json.dumps(record))


def forget(path: Path) -> None:
    """Delete a file together with what is recorded about it."""
    path.unlink(missing_ok=True)
    _record_path(path).unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a small file so that readers see the old content or the new, never a part."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256.json")
