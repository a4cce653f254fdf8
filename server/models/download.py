"""Fetching one file over HTTP: resumed after interruptions, and accepted only with the right SHA-256.

Owns the ``.part`` file, retries and the final rename. Knows nothing about the catalog or about where models
live. Sizes are bytes.
"""

import errno
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.server.errors import ChecksumError, DownloadError
from paceline.server.models.progress import Update
from paceline.server.models.verified import forget, record_sha256, sha256_file

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

#: A host that accepts no connection within this time counts as unreachable.
CONNECT_SECONDS = 3.0
READ_SECONDS = 30.0
ATTEMPTS = 4


def probe(url: str) -> str | None:
    """None if a host answers at all, else why not; takes a few seconds at most."""
    import httpx

    try:
        httpx.head(url, timeout=httpx.Timeout(CONNECT_SECONDS))
    except httpx.HTTPError as error:
        return str(error) or type(error).__name__
    return None


def fetch_url(url: str, part: Path, *, headers: Mapping[str, str], update: Update) -> None:
    """Download ``url`` into ``part``, going on where an earlier attempt stopped.

    Raises:
        DownloadError: the server refuses, or the connection failed ``ATTEMPTS`` times in a row.
    """
    import httpx

    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    with httpx.Client(timeout=timeout, follow_redirects=True, headers=dict(headers)) as client:
        failures = 0
        while True:
            size_before = _size(part)
            try:
                return _fetch_once(client, url, part, update)
            except (httpx.TransportError, _TryAgainError) as error:
                # An attempt that moved on starts the count afresh: long downloads survive many short cuts.
                failures = 1 if _size(part) > size_before else failures + 1
                if failures >= ATTEMPTS:
                    raise DownloadError(f"{url}: {error or type(error).__name__}") from error
                logger.warning("%s: %s; trying again", part.stem, error or type(error).__name__)
                time.sleep(0.5 * 2**failures)


class _TryAgainError(Exception):
    """A reply that another attempt may mend."""


def _fetch_once(client: "httpx.Client", url: str, part: Path, update: Update) -> None:
    import httpx

    have = _size(part)
    # Compressed transfer would make byte ranges and lengths mean something else than the file's bytes.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            # Complete already, or no prefix of this file at all: the caller's hash check tells which.
            return
        if response.status_code >= 500 or response.status_code == httpx.codes.TOO_MANY_REQUESTS:
            raise _TryAgainError(f"HTTP {response.status_code}")
        if response.is_error:
            raise DownloadError(f"{url}: HTTP {response.status_code}")
        resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        _write(response, part, have if resumed else 0, update)


def _write(response: "httpx.Response", part: Path, start: int, update: Update) -> None:
    expected = response.headers.get("Content-Length")
    done = start
    with part.open("ab" if start else "wb") as file:
        for chunk in response.iter_raw():  # as they come: gathering chunks would lose bytes when cut
            file.write(chunk)
            done += len(chunk)
            update(done)
    if expected is not None and done - start < int(expected):
        raise _TryAgainError("the connection was cut")


def accept(part: Path, destination: Path, sha256: str) -> None:
    """Move a complete download into place if its hash is right, otherwise delete it.

    Raises:
        ChecksumError: names the file, the expected hash and the one it has.
    """
    got = sha256_file(part)
    if got != sha256:
        forget(part)
        raise ChecksumError(
            f"{destination.name} has SHA-256 {got}, expected {sha256}; the download was deleted, run it again"
        )
    part.replace(destination)
    record_sha256(destination, sha256)


def check_space(folder: Path, need_bytes: int, what: str) -> None:
    """Refuse a download that cannot fit on the disk."""
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise DownloadError(
            f"{what} needs {need_bytes / 1e6:.0f} MB in {folder}, {free / 1e6:.0f} MB are free; "
            "free some space or set PACELINE_CACHE to another disk"
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into one clear line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise DownloadError(
            f"cannot write to {folder}: {reason}; free some space or set PACELINE_CACHE to another folder"
        ) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
