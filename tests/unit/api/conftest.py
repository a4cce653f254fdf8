"""The API over a scripted engine."""

import pytest
from asgi_client import AsgiClient
from fake_engine import FakeEngine

from paceline.server.api.app import create_app
from paceline.server.api.settings import ApiSettings
from paceline.server.metrics import Metrics


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> AsgiClient:
    return AsgiClient(create_app(engine, ApiSettings(), Metrics()))
