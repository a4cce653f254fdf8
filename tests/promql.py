"""What a PromQL query speaks of: its selectors, and the labels that it groups and joins by."""

from promql_parser import AggregateExpr, BinaryExpr, Expr, VectorSelector, parse, walk


def selectors(query: str) -> set[str]:
    """Every series selector, without range and offset: ``name{matchers}``."""
    found = (part for part in _parts(query) if isinstance(part, VectorSelector))
    return {f"{part.name}{part.matchers}".removesuffix("{}") for part in found}


def grouping_labels(query: str) -> set[str]:
    """Every label that the query groups or joins by, but for ``le``, which histograms have."""
    found: list[str] = []
    for part in _parts(query):
        if isinstance(part, AggregateExpr) and part.modifier is not None:
            found += part.modifier.labels
        elif isinstance(part, BinaryExpr) and part.modifier is not None:
            found += part.modifier.matching.labels if part.modifier.matching is not None else ()
            found += part.modifier.group_labels or ()
    return set(found) - {"le"}


def _parts(query: str) -> list[Expr]:
    found: list[Expr] = []
    walk(parse(query), found.append)
    return found
