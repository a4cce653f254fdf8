"""``kernels``: a test that uses it runs on both executors, torch modules and the native CPU kernels."""

import pytest
from native_kernels import require_native


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which executor a ``LocalEngine`` takes on CPU."""
    if request.param == "native":
        require_native()
    monkeypatch.setenv("PACELINE_KERNELS", request.param)
    return str(request.param)
