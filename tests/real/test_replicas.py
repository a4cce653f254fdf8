"""Two replicas behind nginx with ``deploy/nginx.conf``: requests spread, one replica is killed under load.

Tiny models, real processes: nginx as Debian packages it. Needs no weights, but nginx, and is skipped without.
"""

import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served_process import PATIENCE_SECONDS, ServedProcess, paceline_serve

CONFIG = Path(__file__).parents[2] / "deploy" / "nginx.conf"
MODEL = "tiny"
LISTEN, REPLICAS = "127.0.0.1:8000", ("127.0.0.1:8001", "127.0.0.1:8002")
CLIENTS, EACH = 8, 12


@dataclass(frozen=True)
class Cluster:
    """nginx's URL and the replicas by address."""

    url: str
    replicas: dict[str, ServedProcess]


@pytest.fixture
def cluster(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator[Cluster]:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed (Debian: nginx-light)")
    with ExitStack() as stack:
        served = []
        for name in "ab":
            (tmp_path / name).mkdir()
            arguments = (str(tiny_checkpoint("llama")), "--name", MODEL, "--draft", "none", "--threads", "1")
            served.append(stack.enter_context(paceline_serve(tmp_path / name, *arguments)))
        replicas = {process.url.removeprefix("http://"): process for process in served}
        yield Cluster(stack.enter_context(nginx(tmp_path, list(replicas))), replicas)


class nginx:  # noqa: N801 - a context manager, called like a function
    """A running nginx before ``addresses``; its URL."""

    def __init__(self, folder: Path, addresses: list[str]) -> None:
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._listen = f"127.0.0.1:{free.getsockname()[1]}"
        config = CONFIG.read_text(encoding="utf-8")
        for there, here in zip((LISTEN, *REPLICAS), (self._listen, *addresses), strict=True):
            assert config.count(there) == 1
            config = config.replace(there, here)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
        config = config.replace("http {", f"http {{\naccess_log off;\n{paths}", 1)
        (folder / "nginx.conf").write_text(config, encoding="utf-8")

    def __enter__(self) -> str:
        log = self._folder / "nginx.log"
        command = ["nginx", "-c", str(self._folder / "nginx.conf"), "-e", str(log)]
        self._child = subprocess.Popen(
            [*command, "-g", f"daemon off; pid {self._folder}/nginx.pid;"], stderr=subprocess.DEVNULL
        )
        url = f"http://{self._listen}"
        for _ in range(500):
            assert self._child.poll() is None, log.read_text()
            try:
                httpx.get(url + "/health")
                return url
            except httpx.ConnectError:
                threading.Event().wait(0.02)
        raise AssertionError("nginx does not answer")

    def __exit__(self, *unused: object) -> None:
        self._child.terminate()
        self._child.wait(PATIENCE_SECONDS)


def answered(replica: ServedProcess) -> float:
    """Requests that a replica has finished."""
    families = text_string_to_metric_families(httpx.get(replica.url + "/metrics").text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "vllm:request_success_total"
    )


def test_one_of_two_replicas_is_killed_under_load(cluster: Cluster) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "temperature": 0,
        "max_tokens": 40,
        "extra_body": {"ignore_eos": True},
    }
    under_way = threading.Barrier(CLIENTS + 1)
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="x", max_retries=3, timeout=60) as client:

        def load(number: int) -> list[str]:
            texts = []
            for turn in range(EACH):
                if turn == EACH // 3:
                    under_way.wait(PATIENCE_SECONDS)
                texts.append(
                    client.completions.create(prompt=f"client {number % 4}", **asked).choices[0].text
                )
            return texts

        with ThreadPoolExecutor(CLIENTS) as pool:
            loads = [pool.submit(load, number) for number in range(CLIENTS)]
            under_way.wait(PATIENCE_SECONDS)
            before = {address: answered(replica) for address, replica in cluster.replicas.items()}
            killed = killed_while_streaming(cluster)
            texts = [each.result() for each in loads]
        assert all(count >= CLIENTS // 2 for count in before.values()), f"not spread: {before}"
        assert [len(each) for each in texts] == [EACH] * CLIENTS
        for number, each in enumerate(texts):  # every client has what it had before, and what the others have
            assert set(each) == {texts[number % 4][0]}
        survivor = next(address for address in cluster.replicas if address != killed)
        stream = client.completions.create(prompt="again", stream=True, **asked)
        assert len(list(stream)) > 5
        raw = httpx.post(
            cluster.url + "/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 1}
        )
    assert (raw.status_code, raw.headers["x-replica"].split(", ")[-1]) == (200, survivor)
    assert cluster.replicas[survivor].status("/ready") == 200
    assert httpx.get(cluster.url + "/metrics").status_code == 404


def killed_while_streaming(cluster: Cluster) -> str:
    """Kill the replica that a stream comes from: the stream breaks, asked again it is whole. Which replica that was."""
    body = {
        "model": MODEL,
        "prompt": "a stream",
        "max_tokens": 200,
        "n": 8,
        "ignore_eos": True,
        "stream": True,
    }
    address = ""

    def stream(on_first: Callable[[str], None]) -> str:
        last = ""
        with httpx.stream("POST", cluster.url + "/v1/completions", json=body, timeout=60) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line and not last:
                    on_first(answer.headers["x-replica"].split(", ")[-1])
                last = line or last
        return last

    def kill(replica: str) -> None:
        nonlocal address
        address = replica
        cluster.replicas[replica].child.kill()

    with pytest.raises(httpx.TransportError):
        stream(kill)
    assert stream(lambda replica: None) == "data: [DONE]"
    return address
