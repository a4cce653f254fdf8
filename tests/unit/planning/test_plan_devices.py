"""Data sheets by name: each is whole, and what is not known is refused with what is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.server.errors import ConfigError
from paceline.server.planning.devices import devices, parse_gpus


def test_every_data_sheet_is_whole_and_found_by_any_of_its_names() -> None:
    assert len({device.name for device in devices().values()}) >= 8
    for name, device in devices().items():
        assert parse_gpus(f"3x{name.lower()}") == (3, device)
        assert parse_gpus(name) == (1, device)
        assert 1e10 < device.memory < 1e12
        assert 1e11 < device.bandwidth < 1e13
        assert device.flops("fp32") < device.flops("bf16") <= device.flops("int8")
        assert device.flops("int4") == device.flops("bf16")
        assert device.source


def test_h100_as_printed() -> None:
    count, device = parse_gpus("2xH100-80GB")
    assert count == 2
    assert (device.memory, device.bandwidth, device.flops("bf16"), device.link) == (
        80e9,
        3.35e12,
        989e12,
        450e9,
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("H100-80G", "--gpus: no data sheet of 'H100-80G'; did you mean H100-80GB?"),
        ("Voodoo", "--gpus: no data sheet of 'Voodoo'; Known: A10-24GB, "),
        ("0xH100", "--gpus: the number of GPUs must be from 1 to 1024, not 0"),
        ("2 H100s please", "--gpus: write NAME or COUNTxNAME, such as 2xH100-80GB"),
        ("", "--gpus: write NAME or COUNTxNAME"),
    ],
)
def test_gpus_that_are_not_known(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_gpus(text)
    assert str(caught.value).startswith(said)


@given(st.text())
def test_any_text_is_known_or_refused(text: str) -> None:
    try:
        count, device = parse_gpus(text)
    except ConfigError:
        return
    assert count >= 1
    assert device.name
