"""Stand-ins for the contenders of the side-by-side bench: processes that answer at once, over pipes and HTTP."""

import sys
import textwrap
from pathlib import Path
from typing import Any

import scripted_server

from paceline.clients import peers
from paceline.clients.bench_presets import Plan
from paceline.clients.bench_scenarios import Scenario
from paceline.clients.peers import Spec
from paceline.clients.traffic import ClosedLoop
from paceline.clients.workload import BUILT_IN

#: A worker that answers like ``peer_transformers``, at once.
PIPE_WORKER = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    times = [0.5 + 0.25 * i for i in range(request["max_tokens"])]
    print(json.dumps({"prompt_tokens": len(request["messages"]), "times_s": times}), flush=True)
"""

#: A server that answers like ``paceline serve``, at once.
HTTP_WORKER = """
import sys, time
sys.path.insert(0, sys.argv[2])
import scripted_server as s
def script(call):
    if call.path == "/ready":
        return s.Reply({})
    if call.body is None:
        return s.Reply({"data": [{"id": "served"}]})
    assert call.body["ignore_eos"] is True and call.body["model"] == "served"
    count = call.body["max_tokens"]
    events = [{"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}],
               "usage": {"completion_tokens": i + 1, "prompt_tokens": 2}} for i in range(count)]
    events[-1]["choices"][0]["finish_reason"] = "length"
    return s.Reply(events=events)
with s.ScriptedServer(script, int(sys.argv[1])):
    time.sleep(600)
"""


def pipe_spec(name: str = "pipe", code: str = PIPE_WORKER, family: str = "peer") -> Spec:
    """A worker that takes one stream."""
    argv = (sys.executable, "-c", textwrap.dedent(code))
    return Spec(name, family, argv, 400.0, max_concurrency=1)


def http_spec(name: str = "ours", family: str = "ours") -> Spec:
    """A server that takes any number of streams."""
    port = peers.free_port()
    helpers = str(Path(scripted_server.__file__).parent)
    argv = (sys.executable, "-c", textwrap.dedent(HTTP_WORKER), str(port), helpers)
    return Spec(name, family, argv, 200.0, port=port, ready_path="/ready")


def bench_plan(**changes: Any) -> Plan:
    """A plan of two short rounds, 1 and 2 streams."""
    given: dict[str, Any] = {
        "preset": "smollm2",
        "model": "any",
        "draft": None,
        "serve": [["--weights", "int8"]],
        "scenarios": [Scenario("short", (ClosedLoop(1), ClosedLoop(2)))],
        "rounds": 2,
        "max_tokens": 4,
        "requests": 1,
        "requests_per_stream": 2,
        "prompts": BUILT_IN,
    }
    return Plan(**{**given, **changes})
