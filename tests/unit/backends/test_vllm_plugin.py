"""What runs in vLLM's processes, without vLLM."""

import subprocess
import sys

import psutil
import pytest
import torch
from served_process import PATIENCE_SECONDS
from torch import Tensor

from paceline.server.backends.vllm.plugin import end_with_parent, expand, unless_empty


@pytest.mark.parametrize(
    ("values", "spread"),
    [
        (torch.tensor([0.0, 0.7, 1.5]), torch.tensor([1.0, 1.0, 1.5, 1.5, 1.5])),  # fractions, greedy first
        (torch.tensor([0, 40, 7], dtype=torch.int32), torch.tensor([1, 1, 7, 7, 7], dtype=torch.int32)),
    ],
)
def test_a_requests_value_is_spread_over_its_rows_in_place(values: Tensor, spread: Tensor) -> None:
    output = torch.full((5,), -1, dtype=values.dtype)
    rows_end = torch.tensor([2, 2, 5], dtype=torch.int32)  # the second has no rows
    expand(output=output, input_val=values, cu_num_tokens=rows_end, replace_from=0, replace_to=1)
    assert torch.equal(output, spread)
    expand(output, values, rows_end, 0, 0, MAX_NUM_TOKENS=128)
    assert output[0] == 0


def test_top_k_takes_no_rows_too() -> None:
    def top_k(logits: Tensor, k: Tensor) -> Tensor:
        return logits - k.max()  # as vLLM begins

    none = torch.empty(0, 5)
    assert unless_empty(top_k)(none, torch.empty(0, dtype=torch.int32)) is none
    assert torch.equal(unless_empty(top_k)(torch.ones(2, 5), torch.tensor([1, 0])), torch.zeros(2, 5))


#: A process that starts another one, which watches it, as vLLM's processes do.
PARENT = """
import multiprocessing, time
code = '''
import time
from paceline.server.backends.vllm.plugin import end_with_parent
end_with_parent()
print("watches", flush=True)
time.sleep(600)
'''
child = multiprocessing.get_context("spawn").Process(target=exec, args=(code,))
child.start()
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_process_ends_when_its_parent_was_killed() -> None:
    end_with_parent()  # nothing in a process that multiprocessing did not start
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert parent.stdout.readline() == "watches\n"
        parent.kill()
    gone, _ = psutil.wait_procs([child], timeout=PATIENCE_SECONDS)
    assert gone
