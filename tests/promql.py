"""What a PromQL query speaks of: its selectors, and the labels that it groups and joins by.

Not a parser: enough for queries without strings that hold braces. Prometheus itself says whether a query is right.
"""

import re

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_LABEL_LIST = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_RANGE = re.compile(r"\[[^\]]*\]")
#: A name that no bracket follows, else it is a function's; ``*+`` gives no letter back to make that so.
_SELECTOR = re.compile(r"(?<![\w:.])([a-zA-Z_:][\w:]*+)(?!\s*\()(\s*\{[^}]*\})?")
_WORDS = {"and", "or", "unless", "bool", "offset"}
_DURATION = re.compile(r"\b\d+(?:ms|[smhdwy])\b")


def selectors(query: str) -> set[str]:
    """Every series selector, without range and offset: ``name{matchers}``."""
    strings: list[str] = []

    def keep(match: re.Match[str]) -> str:
        strings.append(match[0])
        return f'"{len(strings) - 1}"'

    bare = _DURATION.sub("", _RANGE.sub("", _LABEL_LIST.sub("", _STRING.sub(keep, query))))
    found = set()
    for match in _SELECTOR.finditer(bare):
        if match[1] not in _WORDS:
            matchers = re.sub(r'"(\d+)"', lambda number: strings[int(number[1])], (match[2] or "").strip())
            found.add(match[1] + matchers)
    return found


def grouping_labels(query: str) -> set[str]:
    """Every label that the query groups or joins by, but for ``le``, which histograms have."""
    listed = (match[1] for match in _LABEL_LIST.finditer(_STRING.sub('""', query)))
    return {name.strip() for names in listed for name in names.split(",") if name.strip()} - {"le"}
