"""A real Prometheus on a loopback port, from Debian's package ``prometheus``; asked through its HTTP API."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

PROGRAM = shutil.which("prometheus")
#: Only a test that would fail anyway waits this long.
PATIENCE_SECONDS = 120


class Prometheus:
    """A running one; see ``prometheus``."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)

    def get(self, path: str, **parameters: str) -> Any:
        """``data`` of an answer; an error of Prometheus's fails with its words."""
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def query(self, text: str) -> list[tuple[Mapping[str, str], float]]:
        """(labels, value) of each series of the result, now."""
        data = self.get("query", query=text)
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(series["metric"], float(series["value"][1])) for series in data["result"]]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.1)


@contextmanager
def prometheus(folder: Path, config: Mapping[str, Any]) -> Iterator[Prometheus]:
    """Start Prometheus with a configuration, its data in ``folder``; it is gone afterwards."""
    assert PROGRAM is not None
    file, log = folder / "prometheus.yml", folder / "log"
    file.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    command = [
        PROGRAM,
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--web.listen-address=127.0.0.1:0",
    ]
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        started = Prometheus(_url(child, log))
        started.until(lambda: started._client.get("/-/ready").status_code == 200)
        yield started
        started._client.close()
    finally:
        child.terminate()
        child.wait(PATIENCE_SECONDS)


def _url(child: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        text = log.read_text(encoding="utf-8")
        if found := re.search(r'msg="Listening on".* address=(127\.0\.0\.1:\d+)', text):
            return f"http://{found[1]}"
        assert child.poll() is None, text
        assert time.monotonic() < deadline, text
        time.sleep(0.05)
