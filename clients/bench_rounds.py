"""The order of measurements of the side-by-side bench: everyone alone, in rotating order, round after round.

Owns turns and rounds; it must not know flags, files or tables. Contenders are started once and paused between their
turns, or, with ``restart``, started for each turn and ended after it.
"""

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from paceline.clients.bench_presets import Plan
from paceline.clients.machine import busy_share
from paceline.clients.peer_report import OURS, Board, Key
from paceline.clients.peers import Contender, PeerError, Spec, contender
from paceline.clients.stats import Sample, summarize
from paceline.clients.traffic import ClosedLoop, progress
from paceline.clients.workload import Prompt

#: Above this share of processor time taken by others before the first round, figures mean little.
BUSY_SHARE = 0.1


def say(text: str) -> None:
    """One line on stderr; stdout is the report's."""
    sys.stderr.write(f"bench: {text}\n")


def levels(spec: Spec, all_levels: Sequence[ClosedLoop]) -> list[ClosedLoop]:
    """Those that the contender takes."""
    most = spec.max_concurrency
    return [level for level in all_levels if most is None or level.concurrency <= most]


async def take_turn(one: Contender, plan: Plan, board: Board, round_number: int) -> None:
    """Warm one running contender up and measure it in every scenario and level."""
    await one.ask(plan.prompts[0], plan.max_tokens)

    async def send(prompt: Prompt) -> Sample:
        return await one.ask(prompt, plan.max_tokens)

    for scenario in plan.scenarios:
        for level in levels(one.spec, scenario.levels):
            prompts = scenario.prompts(plan.prompts, round_number, level, plan.count(level))
            label = f"round {round_number}/{plan.rounds} {one.spec.name} {scenario.name} x{level.name}"
            with progress(label, len(prompts)) as on_sample:
                stats = summarize(level.name, await level.run(send, prompts, on_sample))
            board.add(Key(one.spec.name, scenario.name, level.concurrency), stats)
            say(f"{label}: {stats.output_tok_s:.1f} tok/s")
            for message, count in stats.error_messages.items():
                say(f"{label}: {count} errors: {message}")
            one.check_alive()


class Rounds:
    """All rounds of a plan.

    Args:
        specs: the contenders; ours must not fail, a peer that does is noted on the board and left out.
        plan: what to measure.
        board: where figures go.
    """

    def __init__(self, specs: Sequence[Spec], plan: Plan, board: Board) -> None:
        self._specs, self._plan, self._board = list(specs), plan, board
        self._running: dict[str, Contender] = {}
        self._stack = AsyncExitStack()

    async def run(self) -> None:
        """Measure everything.

        Raises:
            PeerError: one of our own servers did not start or died.
        """
        self._board.families.update((spec.name, spec.family) for spec in self._specs)
        async with self._stack:
            if not self._plan.restart:
                await self._start_all()
            self._board.busy_share = _warn_if_busy()
            for round_number in range(1, self._plan.rounds + 1):
                shift = round_number % max(len(self._specs), 1)
                for spec in self._specs[shift:] + self._specs[:shift]:
                    try:
                        async with self._awake(spec) as one:
                            await take_turn(one, self._plan, self._board, round_number)
                    except PeerError as error:
                        self._leave_out(spec, error)

    async def _start_all(self) -> None:
        for spec in list(self._specs):
            say(f"starting {spec.name}")
            try:
                one = await self._stack.enter_async_context(contender(spec))
                one.pause()
                self._running[spec.name] = one
            except PeerError as error:
                self._leave_out(spec, error)

    @asynccontextmanager
    async def _awake(self, spec: Spec) -> AsyncIterator[Contender]:
        """The contender, running while the block lasts."""
        if self._plan.restart:
            say(f"starting {spec.name}")
            async with contender(spec) as one:
                yield one
            return
        one = self._running[spec.name]
        one.resume()
        yield one
        one.pause()

    def _leave_out(self, spec: Spec, error: PeerError) -> None:
        """Note a peer's failure; ours is not to be passed over."""
        if spec.family == OURS:
            raise error
        self._specs.remove(spec)
        self._board.skipped.append(str(error))
        say(str(error))


def _warn_if_busy() -> float | None:
    """Look at the machine while no contender runs; what it does then is somebody else's."""
    share = busy_share()
    if share is not None and share > BUSY_SHARE:
        say(f"WARNING: with no contender running the processors are {share:.0%} busy; figures will be off")
    return share
