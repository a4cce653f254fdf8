"""Downloading from a real HTTP server on loopback that can cut connections and count what it sent."""

import hashlib
import http.server
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from paceline.server.errors import ChecksumError, DownloadError
from paceline.server.models import download
from paceline.server.models.verified import known_sha256, record_sha256, sha256_file

CONTENT = bytes(range(256)) * 4096


@dataclass
class Hub:
    """A file server; ``cuts`` lists after how many bytes to drop each of the next replies."""

    url: str = ""
    content: bytes = CONTENT
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.ranges.append(self.headers.get("Range"))
            if state.statuses:
                self.send_error(state.statuses.pop(0))
                return
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            if start >= len(state.content):
                self.send_error(416)
                return
            body = state.content[start:]
            self.send_response(206 if self.headers.get("Range") else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.cuts.pop(0)] if state.cuts else body)

        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)


def fetch(hub: Hub, part: Path) -> list[int]:
    seen: list[int] = []
    download.fetch_url(f"{hub.url}/file", part, headers={}, update=seen.append)
    return seen


def test_a_download_reports_every_byte(hub: Hub, tmp_path: Path) -> None:
    seen = fetch(hub, tmp_path / "f.part")

    assert (tmp_path / "f.part").read_bytes() == CONTENT
    assert seen == sorted(seen)
    assert seen[-1] == len(CONTENT)


def test_cut_connections_are_resumed_where_they_broke(hub: Hub, tmp_path: Path) -> None:
    # More cuts than attempts: each one moved on, so none of them ends the download.
    hub.cuts = [100_000] * (download.ATTEMPTS + 2)

    fetch(hub, tmp_path / "f.part")

    assert (tmp_path / "f.part").read_bytes() == CONTENT
    assert hub.ranges == [None] + [f"bytes={n * 100_000}-" for n in range(1, download.ATTEMPTS + 3)]


def test_what_an_earlier_run_left_is_continued(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT[:300_000])

    seen = fetch(hub, tmp_path / "f.part")

    assert hub.ranges == ["bytes=300000-"]
    assert (tmp_path / "f.part").read_bytes() == CONTENT
    assert seen[0] > 300_000


def test_a_complete_part_is_left_for_the_hash_check(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT)

    fetch(hub, tmp_path / "f.part")

    assert (tmp_path / "f.part").read_bytes() == CONTENT


def test_server_errors_are_tried_again_and_refusals_are_not(hub: Hub, tmp_path: Path) -> None:
    hub.statuses = [503, 503]
    fetch(hub, tmp_path / "f.part")
    assert len(hub.ranges) == 3

    hub.statuses, hub.ranges = [404], []
    with pytest.raises(DownloadError, match="HTTP 404"):
        fetch(hub, tmp_path / "g.part")
    assert len(hub.ranges) == 1


def test_a_server_that_stays_down_is_given_up(hub: Hub, tmp_path: Path) -> None:
    hub.statuses = [500] * 20

    with pytest.raises(DownloadError, match="HTTP 500"):
        fetch(hub, tmp_path / "f.part")

    assert len(hub.ranges) == download.ATTEMPTS


def test_probe_says_why_a_host_cannot_be_reached(hub: Hub) -> None:
    assert download.probe(hub.url) is None  # it answers, if only with 404
    assert download.probe("http://127.0.0.1:9") is not None


def test_accept_moves_the_right_file_into_place_and_remembers_its_hash(tmp_path: Path) -> None:
    part, destination = tmp_path / "f.part", tmp_path / "f"
    part.write_bytes(CONTENT)
    sha256 = hashlib.sha256(CONTENT).hexdigest()

    download.accept(part, destination, sha256)

    assert destination.read_bytes() == CONTENT
    assert not part.exists()
    assert known_sha256(destination) == sha256


def test_accept_deletes_a_wrong_file_and_names_both_hashes(tmp_path: Path) -> None:
    part, destination = tmp_path / "f.part", tmp_path / "model.gguf"
    part.write_bytes(b"other bytes")

    with pytest.raises(ChecksumError) as caught:
        download.accept(part, destination, "0" * 64)

    assert "model.gguf" in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert hashlib.sha256(b"other bytes").hexdigest() in str(caught.value)
    assert not part.exists()
    assert not destination.exists()


def test_a_changed_file_is_no_longer_known(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"one")
    record_sha256(file, sha256_file(file))
    assert known_sha256(file) == hashlib.sha256(b"one").hexdigest()

    file.write_bytes(b"three")

    assert known_sha256(file) is None

    record_sha256(file, sha256_file(file))
    stat = file.stat()
    file.write_bytes(b"THREE")  # same size, later
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert known_sha256(file) is None


def test_a_download_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"needs .* MB .* are free; .*PACELINE_CACHE"):
        download.check_space(tmp_path, 1 << 60, "huge")


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="the disk is full"), download.disk_errors(tmp_path):
        raise OSError(28, "No space left on device")


def test_without_a_terminal_progress_is_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    from paceline.server.models.progress import LogProgress

    caplog.set_level(logging.INFO)
    with LogProgress(interval_seconds=0.0).task("downloading x", 100_000_000) as update:
        update(0)
        update(50_000_000)

    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "downloading x: 100 MB"
    assert "50/100 MB (50%)" in lines[2]
    assert "left" in lines[2]
    assert lines[-1].startswith("downloading x: done")
