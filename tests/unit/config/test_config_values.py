"""Every key and any value: either the checked value or one line that begins with the place."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.server.config import Key, PacelineConfig, keys, load_config
from paceline.server.config.schema import SECTIONS
from paceline.server.config.values import convert
from paceline.server.errors import ConfigError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5
)

TYPES = {"text": str, "texts": tuple, "int": int, "float": float, "bool": bool, "choice": str}


def fits(key: Key, value: object) -> bool:
    """Whether a converted value is of the key's kind and within its bounds."""
    if value is None:
        return key.none_word is not None
    if type(value) is not TYPES[key.kind]:
        return False
    if isinstance(value, int | float) and not isinstance(value, bool):
        return math.isfinite(value) and (key.low or -math.inf) <= value <= (key.high or math.inf)
    return value in key.choices if key.kind == "choice" else value not in ("", ()) or key.kind == "texts"


@given(key=st.sampled_from(keys()), value=ANYTHING, text=st.booleans())
def test_any_value_is_converted_or_refused_in_one_line(key: Key, value: object, text: bool) -> None:
    outcome: object
    try:
        outcome = convert(key, value, "the place", text=text)
    except ConfigError as error:
        outcome = error
    if isinstance(outcome, ConfigError):
        assert str(outcome).startswith("the place: ")
        assert len(str(outcome).splitlines()) == 1
        assert len(str(outcome)) < 300
    else:
        assert fits(key, outcome)


@given(st.integers(min_value=0, max_value=65535), st.floats(min_value=0, allow_infinity=False))
def test_numbers_read_the_same_from_file_and_text(port: int, seconds: float) -> None:
    by_name = {key.name: key for key in keys()}
    for key, value in ((by_name["port"], port), (by_name["drain_seconds"], seconds)):
        assert convert(key, str(value), "x", text=True) == convert(key, value, "x", text=False) == value


@pytest.mark.parametrize("word", ["1_000", "0x10", "1.0", "", "1e3", "٣", "9" * 5000])
def test_odd_whole_numbers_are_refused(word: str) -> None:
    port = next(key for key in keys() if key.name == "port")
    with pytest.raises(ConfigError, match="expected a whole number"):
        convert(port, word, "x", text=True)


@pytest.mark.parametrize(
    ("word", "value"), [("true", True), ("ON", True), ("1", True), ("no", False), ("0", False)]
)
def test_switches_in_variables(word: str, value: bool) -> None:
    config = load_config(None, {"PACELINE_ENGINE_PREFIX_CACHING": word}, {})
    assert config.engine.prefix_caching is value


def _given(key: Key) -> str:
    """A text for the key that differs from its default."""
    if key.kind == "choice":
        return next((choice for choice in key.choices if choice != key.default), key.choices[0])
    if key.kind == "bool":
        return "false" if key.default else "true"
    return "0.5" if key.high == 1 else "3" if key.kind in ("int", "float") else "given"


@pytest.mark.parametrize("key", keys(), ids=lambda key: f"{key.section}.{key.name}")
def test_every_key_can_be_set_by_file_variable_and_flag(key: Key, tmp_path: Path) -> None:
    text = _given(key)
    value = convert(key, text, "x", text=True)
    written = json.dumps(list(value) if isinstance(value, tuple) else value)
    table = {"model": "[[models]]", "speculation": '[[models]]\ntarget = "t"\n[models.speculation]'}
    target = 'target = "t"\n' if key.section == "model" and key.name != "target" else ""
    path = tmp_path / "c.toml"
    path.write_text(f"{table.get(key.section, f'[{key.section}]')}\n{target}{key.name} = {written}\n")

    from_file = load_config(path, {}, {})
    assert _read(from_file, key) == value
    assert _read(load_config(None, {key.variable: text}, {}), key) == value
    assert _read(load_config(None, {}, {key.param: [text] if key.kind == "texts" else text}), key) == value


def _read(config: PacelineConfig, key: Key) -> object:
    model = config.models[0]
    table = {
        "server": config.server,
        "engine": config.engine,
        "model": model,
        "speculation": model.speculation,
    }
    return getattr(table[key.section], key.name)


def test_every_field_of_every_table_is_a_key() -> None:
    named = {(key.section, key.name) for key in keys()}
    fields = {
        (section, entry.name) for section, kind in SECTIONS.items() for entry in dataclasses.fields(kind)
    }
    own_tables = {("model", "speculation"), ("model", "steering"), ("engine", "vllm")}
    assert fields - named == own_tables
    assert len({key.param for key in keys()}) == len(keys())


def test_defaults_satisfy_their_own_key() -> None:
    for key in keys():
        if key.default is not dataclasses.MISSING:
            assert fits(key, key.default)
