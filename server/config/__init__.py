"""What a server is told to do: frozen dataclasses, and the one way to read, check and complete them.

``schema`` names every key once (type, range, help); ``load`` reads file, environment and flags through it.
``resolve`` replaces "auto" by concrete values for the machine it runs on. Nothing here imports torch before
it must, and nothing here knows HTTP or the engine.
"""

from paceline.server.config.load import DEFAULT_TARGET, load_config
from paceline.server.config.machine import Machine
from paceline.server.config.resolve import resolve
from paceline.server.config.schema import (
    EngineConfig,
    Key,
    ModelSpec,
    PacelineConfig,
    ServerConfig,
    SpeculationConfig,
    keys,
)

__all__ = [
    "DEFAULT_TARGET",
    "EngineConfig",
    "Key",
    "Machine",
    "ModelSpec",
    "PacelineConfig",
    "ServerConfig",
    "SpeculationConfig",
    "keys",
    "load_config",
    "resolve",
]
