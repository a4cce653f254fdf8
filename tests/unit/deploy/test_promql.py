"""The reading of queries that the dashboards' check relies on: a name that it missed would go unchecked."""

import pytest
from promql import grouping_labels, selectors


@pytest.mark.parametrize(
    ("query", "names", "labels"),
    [
        ("up", {"up"}, set()),
        ('absent(up{job="a"})', {'up{job="a"}'}, set()),
        ("sum by (job, le) (rate(a:b_bucket[5m])) > 0.8 * time()", {"a:b_bucket"}, {"job"}),
        (
            'x{p="{not a brace}"} and on (q) y unless z',
            {'x{p="{not a brace}"}', "y", "z"},
            {"q"},
        ),
        ("deriv(sum without (i) (a_b)[10m:30s]) + rate(c:d[1d] offset 1h) / 1e3", {"a_b", "c:d"}, {"i"}),
        ("a / on () group_left (l) sum(b)", {"a", "b"}, {"l"}),
        ('histogram_quantile(0.5, rate(a{b=~"c.*"}[5m]))', {'a{b=~"c.*"}'}, set()),
    ],
)
def test_selectors_and_labels(query: str, names: set[str], labels: set[str]) -> None:
    assert selectors(query) == names
    assert grouping_labels(query) == labels
