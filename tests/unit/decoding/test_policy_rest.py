"""How long a crowd rests from deciding, and what ends it."""

from paceline.server.decoding.policy import Decision, Option
from paceline.server.decoding.policy.rest import Rest


def test_a_crowd_is_asked_at_once_when_it_shrinks_or_a_model_drafts() -> None:
    none = [Decision(reason="batch_cost")] * 16
    rest = Rest()
    for _ in range(5):
        rest.settle(none)
    assert [rest.take(n) for n in (16, 17, 13, 11, 16)] == [True, True, True, False, False]
    rest.settle(none)
    rest.settle([*none[1:], Decision(1, Option("draft", by_model=True))])
    assert not rest.take(16)


def test_only_where_nobody_drafts_for_lasting_reasons_does_everything_rest() -> None:
    none, rest = [Decision(reason="batch_cost")] * 16, Rest()
    rest.settle(none)
    assert rest.is_total
    for unrest in (Decision(2, Option("ngram")), Decision(reason="no_match"), Decision(reason="no_room")):
        rest.settle([*none[1:], unrest])
        assert rest.take(16)
        assert not rest.is_total


def test_a_rest_grows_and_begins_anew() -> None:
    none, rest = [Decision(reason="low_acceptance")] * 8, Rest()

    def length() -> int:
        rest.settle(none)
        return list(iter(lambda: rest.take(8), False)).count(True)

    assert [length() for _ in range(7)] == [1, 2, 4, 8, 16, 32, 32]
    rest.settle([*none[1:], Decision(2, Option("draft", by_model=True))])
    assert length() == 1
