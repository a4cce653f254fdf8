"""Ctrl-C ends a long job with KeyboardInterrupt, whatever a library makes of it on the way."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C inside raises KeyboardInterrupt here, even if it arrived as another exception.

    Libraries in C that call Python answer whatever is raised there with an error of their own: safetensors makes a
    ValueError of a Ctrl-C that meets it while it builds a tensor, which would read like a damaged file.

    Where SIGINT is ignored or somebody else's, as in background jobs of a shell, nothing is changed.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    arrived = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal arrived
        arrived = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if arrived:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
