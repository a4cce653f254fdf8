"""How large the campaigns are: ``PACELINE_CAMPAIGN=full`` (``make study``, ``soak``, ``fuzz``), or a twentieth."""

import os

FULL = os.environ.get("PACELINE_CAMPAIGN") == "full"


def size(full: int) -> int:
    """``full`` in a full campaign, else a twentieth of it."""
    return full if FULL else full // 20
