"""Ctrl-C while a job runs: always KeyboardInterrupt, whatever a library turned it into; errors of the job stay."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from paceline.draftmodels.jobs.budget import Budget
from paceline.draftmodels.jobs.checkpoint import JobState
from paceline.draftmodels.jobs.interrupts import interruptible
from paceline.draftmodels.jobs.ranks import Ranks
from paceline.draftmodels.jobs.running import RunningJob


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """Python's own, before and after."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    left = signal.signal(signal.SIGINT, before)
    assert left is signal.default_int_handler


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)  # the signal ends it


def library_in_c() -> None:
    """Answers whatever happens inside it with an error of its own, as safetensors does."""
    try:
        ctrl_c()
    except BaseException:
        raise ValueError("could not determine the shape") from None


def test_an_interrupt_that_a_library_turned_into_an_error_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, interruptible():
        library_in_c()
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_error_of_the_job_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match="shape"), interruptible():
        raise ValueError("shape")


def test_a_signal_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_while_training_the_first_waits_and_the_second_counts_too() -> None:
    job = RunningJob(JobState(), Budget(steps=9), Ranks())

    def train() -> None:
        with job.training(threads=1):
            os.kill(os.getpid(), signal.SIGINT)
            assert job.stop(exhausted=False)
            library_in_c()

    with pytest.raises(KeyboardInterrupt), interruptible():
        train()
    assert job.interrupted
