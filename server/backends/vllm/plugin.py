"""Loaded by vLLM in each of its processes (entry point ``vllm.general_plugins``): sampling beside a draft on CPUs, and
an end to what vLLM would leave running.

Without Triton's CPU backend, vLLM 0.32 replaces the Triton kernel that spreads a request's temperature, top_k and top_p
over its drafted rows by ``cpu_triton_utils._expand_kernel_impl``. That converts them to int64, so that a temperature
loses its fraction, and writes into a converted copy of the output, which nobody reads: the rows to verify are then
divided by memory that nobody wrote. ``expand`` takes its place. And a step in which nobody has a drafted row left, all
being at their last token, ends the engine if a request has top_k, which takes the maximum of nothing. Where Triton
runs, nobody calls either.

Killed outright, a server cannot end vLLM's processes, which then poll for work for ever; each watches its parent.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import wait

import torch
from torch import Tensor

from paceline.server.backends.vllm.installed import installed_vllm

#: Set by ``build`` and inherited by its vLLM's processes: other users of this environment get vLLM as it is.
WANTED = "PACELINE_MEND_VLLM"


def register() -> None:
    """What the entry point names; vLLM calls it in each process, before it registers its kernels."""
    if os.environ.get(WANTED) != "1":
        return
    end_with_parent()
    installed_vllm()  # nothing of a version that is not known is replaced
    from vllm.utils import cpu_triton_utils
    from vllm.v1.sample.ops import topk_topp_sampler

    cpu_triton_utils._expand_kernel_impl = expand
    topk_topp_sampler.apply_top_k_only = unless_empty(topk_topp_sampler.apply_top_k_only)


def end_with_parent() -> None:
    """Kill this process once the one that started it is gone; nothing in a process of its own."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def unless_empty(top_k: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """``top_k``, a function of logits [rows, vocabulary] and k [rows], that takes no rows, too."""
    return lambda logits, k: top_k(logits, k) if len(logits) else logits


# The names are those of the kernel that it stands in for, as vLLM passes them on by name.
def expand(
    output: Tensor,
    input_val: Tensor,
    cu_num_tokens: Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,  # noqa: N803
) -> None:
    """Spread one value per request over its rows, in place.

    Args:
        output: [rows], filled; of the type of ``input_val``.
        input_val: [requests].
        cu_num_tokens: [requests], where each request's rows end.
        replace_from, replace_to: the value that is replaced, and by what: a greedy request's temperature.
        MAX_NUM_TOKENS: of the kernel; not needed here.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
    values = torch.where(input_val == replace_from, torch.full_like(input_val, replace_to), input_val)
    output.copy_(values.repeat_interleave(counts))
