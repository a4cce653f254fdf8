"""The documents show only what exists: commands, flags, make targets, configuration keys, files."""

import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paceline.server.config import load_config

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "server/README.md",
    "draftmodels/README.md",
    "clients/README.md",
    "kernels/README.md",
    "deploy/README.md",
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS = PROJECT["entry-points"]["paceline.commands"]

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"""(?:\]\(|src="|srcset=")(?!https?:|#|mailto:)([^)"#]+)""")


def blocks(language: str) -> list[str]:
    return [
        text
        for document in DOCUMENTS
        for found, text in FENCE.findall((ROOT / document).read_text(encoding="utf-8"))
        if found == language
    ]


def shell_lines() -> Iterator[str]:
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.partition(" #")[0].strip()


def calls(program: str) -> list[list[str]]:
    """Argument lists of a program in the documents' shell blocks, whatever folder it is called from."""
    words = (re.sub(r"\w+=\S+ +", "", line).split() for line in shell_lines())
    return [line[1:] for line in words if line and Path(line[0]).name == program]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_two_commands_come_first() -> None:
    assert [arguments[0] for arguments in calls("make")][:2] == ["serve", "test"]


def test_make_targets_exist() -> None:
    assert {arguments[0] for arguments in calls("make")} <= make_targets()


def test_commands_and_flags_exist(command_help: Callable[[str], str]) -> None:
    used = calls("paceline")
    assert used
    for command, *arguments in used:
        assert command in COMMANDS
        if "COMMAND [ARGS]" in command_help(command):  # a group: the flags are its commands'
            command = f"{command} {arguments[0]}"
        flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
        known = set(re.findall(r"(?<![\w-])-{1,2}[a-z][a-z-]*", command_help(command)))
        assert set(flags) <= known, f"paceline {command}"


def test_the_table_of_commands_is_complete() -> None:
    table = re.findall(
        r"^\| `paceline ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(set(table)) == sorted(COMMANDS)  # a group has a row per command of its


def test_python_parses() -> None:
    assert blocks("python")
    for text in blocks("python"):
        compile(text, "README.md", "exec")


def test_configuration_is_accepted(tmp_path: Path) -> None:
    assert blocks("toml")
    for text in blocks("toml"):
        file = tmp_path / "paceline.toml"
        file.write_text(text, encoding="utf-8")
        assert load_config(file, {}, {}).models


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    targets = LINK.findall(path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []
