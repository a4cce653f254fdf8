"""Reads the configuration: flag over environment variable over file over default.

Every source becomes a layer of checked values by (section, key). Each layer is checked in full (a bad
value is an error even where a stronger source overrides it), then the layers are laid over each other.
Environment variables are ``PACELINE_<SECTION>_<KEY>`` (sections server, engine, model, speculation) and
``PACELINE_API_KEY``. Model keys from flags and variables speak about the one model being served; with several
models in the file they are refused, as it would be unclear which one is meant.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paceline.server.config.schema import (
    EXPERT_DRAFT,
    EngineConfig,
    Key,
    ModelSpec,
    PacelineConfig,
    Section,
    ServerConfig,
    SpeculationConfig,
    SteeringConfig,
    keys,
    section_keys,
)
from paceline.server.config.steering import read_steering
from paceline.server.config.values import convert, nearest
from paceline.server.config.vllm import (
    check_vllm,
    engine_arguments,
    model_arguments,
    read_arguments,
)
from paceline.server.errors import ConfigError

DEFAULT_TARGET = "smollm2-135m-instruct"

API_KEY_VARIABLE = "PACELINE_API_KEY"

_MODEL_SECTIONS: tuple[Section, ...] = ("model", "speculation")


@dataclass(frozen=True)
class _Value:
    """A checked value and where it was written."""

    value: Any
    place: str


_Layer = dict[tuple[str, str], _Value]


@dataclass(frozen=True)
class _FileModel:
    """A ``[[models]]`` table: its keys, and its pairs, which only a file can have."""

    layer: _Layer
    steering: tuple[SteeringConfig, ...] = ()


def load_config(path: Path | None, env: Mapping[str, str], flags: Mapping[str, object]) -> PacelineConfig:
    """The configuration from all its sources.

    Args:
        path: the TOML file, if there is one.
        env: environment variables; those outside Paceline's sections are left alone.
        flags: values by ``Key.param``; None (and an empty list) means that the flag was not given.

    Raises:
        ConfigError: unknown key, wrong type, value out of range, or keys that contradict each other.
    """
    shared, models, vllm = _read_file(path) if path is not None else ({}, [], {})
    above = _env_layer(env) | _flag_layer(flags)
    shared |= {spot: value for spot, value in above.items() if spot[0] not in _MODEL_SECTIONS}
    for_model = {spot: value for spot, value in above.items() if spot[0] in _MODEL_SECTIONS}
    if len(models) > 1 and for_model:
        place = next(iter(for_model.values())).place
        raise ConfigError(
            f"{place}: {path} lists {len(models)} models; set it in the [[models]] table it is for"
        )
    models = models or [_FileModel({("model", "target"): _Value(DEFAULT_TARGET, "default")})]
    specs = tuple(
        _model(model.layer | for_model, model.steering, _spot(path, index))
        for index, model in enumerate(models)
    )
    _check_names(specs, path)
    engine = EngineConfig(**_section(shared, "engine"))
    if engine.kind == "vllm":
        check_vllm(replace(engine, vllm=vllm), specs, _given(models[0].layer | for_model, "speculation"))
        vllm = engine_arguments(_given(shared, "engine"), vllm)
        vllm = model_arguments(specs[0], vllm, _spot(path, 0))
    elif vllm:
        raise ConfigError(
            f'{path}:engine.vllm: read with engine.kind = "vllm" only; leave one of the two out'
        )
    return PacelineConfig(
        server=ServerConfig(**_section(shared, "server")), engine=replace(engine, vllm=vllm), models=specs
    )


def default_name(target: str) -> str:
    """The name clients ask for when none is configured: the last part of the reference."""
    reference = target.removeprefix("hf:").split("@")[0] if target.startswith("hf:") else target
    return Path(reference).name.removesuffix(".gguf") or target


def _section(layer: _Layer, section: Section) -> dict[str, Any]:
    return {name: entry.value for (part, name), entry in layer.items() if part == section}


def _given(layer: _Layer, section: Section) -> dict[str, tuple[Any, str]]:
    """What somebody set in a section, and where."""
    return {name: (entry.value, entry.place) for (part, name), entry in layer.items() if part == section}


def _spot(path: Path | None, index: int) -> str:
    return f"{path}:models[{index}]" if path is not None else "MODEL"


# ---- file


def _read_file(path: Path) -> tuple[_Layer, list[_FileModel], dict[str, Any]]:
    """Its keys, its models, and its arguments for vLLM."""
    tables = _parse(path)
    shared: _Layer = {}
    models: list[_FileModel] = []
    vllm: dict[str, Any] = {}
    for name, table in tables.items():
        if name == "engine" and isinstance(table, dict) and "vllm" in table:
            vllm = read_arguments(table.pop("vllm"), f"{path}:engine.vllm")
        if name in ("server", "engine"):
            shared |= _table(table, "server" if name == "server" else "engine", f"{path}:{name}")
        elif name == "models":
            models = _read_models(table, path)
        else:
            raise ConfigError(f"{path}:{name}: unknown key; {nearest(name, ['server', 'engine', 'models'])}")
    return shared, models, vllm


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config: there is no file {path}") from None
    except OSError as error:
        raise ConfigError(f"--config: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # bad TOML or bad UTF-8
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _read_models(tables: object, path: Path) -> list[_FileModel]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}:models: write one [[models]] table per model")
    return [_read_model(dict(table), _spot(path, index)) for index, table in enumerate(tables)]


def _read_model(table: dict[str, Any], place: str) -> _FileModel:
    speculation, steering = table.pop("speculation", {}), table.pop("steering", [])
    layer = _table(table, "model", place) | _table(speculation, "speculation", f"{place}.speculation")
    return _FileModel(layer, read_steering(steering, f"{place}.steering"))


def _table(table: object, section: Section, place: str) -> _Layer:
    if not isinstance(table, dict):
        raise ConfigError(f"{place}: expected a table, got {table!r:.60}")
    known = section_keys(section)
    layer: _Layer = {}
    for name, value in table.items():
        spot = f"{place}.{name}"
        if name not in known:
            raise ConfigError(f"{spot}: unknown key; {_file_hint(name, section)}")
        layer[section, name] = _Value(convert(known[name], value, spot, text=False), spot)
    return layer


def _file_hint(name: str, section: Section) -> str:
    elsewhere = [key for key in keys() if key.name == name and key.section != section]
    if elsewhere:
        return f'did you mean "{_table_name(elsewhere[0])}.{name}"?'
    nested = {"model": ["speculation", "steering"], "engine": ["vllm"]}.get(section, [])
    return nearest(name, [*section_keys(section), *nested])


def _table_name(key: Key) -> str:
    return {"model": "models", "speculation": "models.speculation"}.get(key.section, key.section)


# ---- environment and flags


def _env_layer(env: Mapping[str, str]) -> _Layer:
    known = {key.variable: key for key in keys()}
    prefixes = tuple(f"PACELINE_{section}_".upper() for section in {key.section for key in keys()})
    layer: _Layer = {}
    for name in sorted(name for name in env if name.startswith(prefixes)):
        if name not in known:
            raise ConfigError(f"{name}: unknown environment variable; {nearest(name, known)}")
        key = known[name]
        _refuse_kubernetes(name, env[name])
        layer[key.section, key.name] = _Value(convert(key, env[name], name, text=True), name)
    return layer | _short_api_key(env)


def _refuse_kubernetes(name: str, value: str) -> None:
    """A Kubernetes service called ``paceline-server`` sets PACELINE_SERVER_PORT to an address of its own."""
    if name == "PACELINE_SERVER_PORT" and value.startswith("tcp://"):
        raise ConfigError(
            f"{name}: set by a Kubernetes service called paceline-server, not by you; rename the service or "
            "set enableServiceLinks: false in the pod"
        )


def _short_api_key(env: Mapping[str, str]) -> _Layer:
    if not env.get(API_KEY_VARIABLE):
        return {}
    key = section_keys("server")["api_keys"]
    if key.variable in env:
        raise ConfigError(f"{API_KEY_VARIABLE}: {key.variable} is set as well; keep one of the two")
    return {("server", "api_keys"): _Value((env[API_KEY_VARIABLE],), API_KEY_VARIABLE)}


def _flag_layer(flags: Mapping[str, object]) -> _Layer:
    known = {key.param: key for key in keys()}
    layer: _Layer = {}
    for name, value in flags.items():
        if name not in known:
            raise ConfigError(f"{name}: unknown flag; {nearest(name, known)}")
        key = known[name]
        if value is not None and value != [] and value != ():
            layer[key.section, key.name] = _Value(convert(key, value, key.flag, text=True), key.flag)
    return layer


# ---- models


def _model(layer: _Layer, steering: tuple[SteeringConfig, ...], place: str) -> ModelSpec:
    values = _section(layer, "model")
    if "target" not in values:
        raise ConfigError(f'{place}: target is missing; add a line such as target = "{DEFAULT_TARGET}"')
    values.setdefault("name", default_name(values["target"]))
    speculation = SpeculationConfig(**_section(layer, "speculation"))
    if speculation.draft == "ngram" and not speculation.ngram:
        draft = layer["speculation", "draft"].place
        raise ConfigError(f'{draft}: draft "ngram" contradicts ngram = false for {place}; change one of them')
    if speculation.draft == EXPERT_DRAFT and not any(pair.expert for pair in steering):
        draft = layer["speculation", "draft"].place
        raise ConfigError(
            f'{draft}: draft "expert" needs a [[models.steering]] table with an expert in {place}'
        )
    return ModelSpec(**values, speculation=speculation, steering=steering)


def _check_names(specs: tuple[ModelSpec, ...], path: Path | None) -> None:
    seen: dict[str, int] = {}
    for index, spec in enumerate(specs):
        if spec.name in seen:
            raise ConfigError(
                f'{_spot(path, index)}.name: models[{seen[spec.name]}] is called "{spec.name}" as well; '
                "give each model a name of its own"
            )
        seen[spec.name] = index
