"""``isa``: a test that uses it runs on every instruction set of this CPU, each forced in turn."""

import pytest
from native_kernels import require_native

from paceline.kernels.cpu.library import ISAS, Isa


@pytest.fixture(params=ISAS, scope="session")
def isa(request: pytest.FixtureRequest) -> Isa:
    """An instruction set that this CPU runs."""
    chosen: Isa = request.param
    require_native(chosen)
    return chosen
