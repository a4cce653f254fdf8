"""How pruning shows itself."""

import logging

import pytest

from paceline.draftmodels.prune.show import LogLines, Meter


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_once_per_interval_and_say_rate_error_and_time_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    meter = Meter(LogLines(10.0, clock), layers=4, total=40, clock=clock)
    for layer in range(2):
        meter.layer("pruning", layer)
        for _ in range(10):
            clock.now += 1
            meter.advance()
        meter.error(0.25)
    meter.display.note("by the way")
    assert [record.message for record in caplog.records] == [
        "pruning layer 1/4, 0.10 layers/s, 39 s left",
        "pruning layer 2/4, 0.10 layers/s, error 0.250, 29 s left",
        "by the way",
    ]
