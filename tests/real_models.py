"""Real weights for the tests marked ``real``: fetched and verified through the catalog, as a user's would be.

A download that fails fails the test: a suite that quietly leaves the real models out proves nothing.
"""

from functools import cache
from pathlib import Path

SMOLLM2 = "smollm2-135m-instruct"
QWEN_CODER = "qwen2.5-coder-0.5b-instruct"


@cache
def real_model(name: str) -> Path:
    """Path of a catalog model's weights in the cache (``PACELINE_CACHE``), downloaded on first use.

    Raises:
        paceline.server.errors.DownloadError: no source delivered it.
    """
    from paceline.server.models.sources import resolve  # here: unit tests must not depend on it

    return resolve(name)
