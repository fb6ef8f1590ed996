"""A command run until it is done: time limits, restarts after failures, and when to give up.

| the command ended | what follows |
|---|---|
| with 0, unasked | done: 0 |
| after SIGTERM or SIGINT to the launcher, which were passed on | the command's own code, no restart |
| with 0 after SAVE at the time limit, with 124 (`timeout`'s code), or was ended at the limit | it goes on: a
  restart, or TIME_IS_UP for whoever started the launcher (which requeues, or asks for another allocation) |
| with any other code | a failure: a restart, and after the last the command's own code |

An error that a user must fix is not tried for ever: two failures in a row with the same code, both within quick_seconds
of the start, end the loop. A command ended by a signal was killed by somebody: that is no such error. What fails at the
same step every time ends with the restarts.
"""

import itertools
import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_vlm.runtime.launching.command import SAVE, Command, Inbox
from megatron_vlm.runtime.logging import get_logger

logger = get_logger(__name__)

TIME_IS_UP = 124  # as of timeout(1), and what vila-run looks for
POLL_SECONDS = 0.5

AtTimeLimit = Literal["count", "free", "leave"]


@dataclass(frozen=True)
class Rules:
    """Limits on restarts: how often and how long.

    Args:
        max_restarts: after failures.
        at_time_limit: `count` restarts then too, within max_restarts; `free` restarts, not counted (each waits in a
            queue again, as vila-run has it); `leave` ends with TIME_IS_UP.
        limit_seconds: of one attempt; None: the command's own affair, or SLURM's.
        save_seconds: before the limit SAVE is sent.
        quick_seconds: a failure within them is a sign of an error that must be mended first.
    """

    max_restarts: int = 0
    at_time_limit: AtTimeLimit = "leave"
    limit_seconds: float | None = None
    save_seconds: float = 120.0
    quick_seconds: float = 60.0


@dataclass(frozen=True)
class Attempt:
    """One run of the command and how it ended; `asked`: it was told to stop for good."""

    code: int
    seconds: float
    asked: bool = False


def run_until_done(arguments: Sequence[str], environment: Mapping[str, str], rules: Rules) -> int:
    """Runs a command and restarts it by the rules; returns the exit code for the launcher.

    Raises:
        ConfigError: there is no such program.
    """
    attempts: list[Attempt] = []
    with Inbox() as inbox:
        while True:
            attempts.append(_run_once(arguments, environment, rules, inbox))
            again, why = decide(attempts, rules)
            logger.info("launch: attempt %d %s", len(attempts), why)
            if not again:
                return attempts[-1].code


def decide(attempts: Sequence[Attempt], rules: Rules) -> tuple[bool, str]:
    """Whether to start again after these attempts, the last of which has just ended; and why, in words."""
    last = attempts[-1]
    if last.asked:
        return False, f"ended, as asked from outside: {describe_code(last.code)}"
    if last.code == 0:
        return False, "ended well"
    what = "stopped at its time limit, unfinished" if last.code == TIME_IS_UP else f"failed: {describe_code(last.code)}"
    if last.code == TIME_IS_UP and rules.at_time_limit == "leave":
        return False, what
    if last.code < 128 and [a.code for a in attempts[-2:] if a.seconds < rules.quick_seconds] == [last.code] * 2:
        return False, f"{what}, at once and as before: an error to mend, not to try again"
    if last.code == TIME_IS_UP and rules.at_time_limit == "free":
        return True, f"{what}; starting again"
    used = _restarts_used(attempts[:-1], rules)
    if used >= rules.max_restarts:
        return False, f"{what}; no restart left of {rules.max_restarts}"
    return True, f"{what}; starting again, restart {used + 1} of {rules.max_restarts}"


def _restarts_used(attempts: Sequence[Attempt], rules: Rules) -> int:
    """All of them; where time limits are free, those since the last: a run that got that far starts counting anew."""
    if rules.at_time_limit != "free":
        return len(attempts)
    return len(list(itertools.takewhile(lambda attempt: attempt.code != TIME_IS_UP, reversed(attempts))))


def describe_code(code: int) -> str:
    """A shell's exit code in words."""
    if code <= 128:
        return f"exit code {code}"
    known = {int(signum): signum.name for signum in signal.Signals}
    return f"exit code {code}, killed by {known.get(code - 128, f'signal {code - 128}')}"


def _run_once(arguments: Sequence[str], environment: Mapping[str, str], rules: Rules, inbox: Inbox) -> Attempt:
    command = Command(arguments, environment)
    started = time.monotonic()
    asked = saving = heard = False
    while (code := command.wait(POLL_SECONDS)) is None:
        command.note_ranks()
        for signum in inbox.take():
            if signum == SAVE:
                saving = True
            else:
                pass_on(command, signum, again=asked)
                asked = True
        left_seconds = rules.limit_seconds - (time.monotonic() - started) if rules.limit_seconds else math.inf
        saving = saving or left_seconds < rules.save_seconds
        if saving and (told := command.tell(SAVE)):
            logger.info("launch: time is nearly up, asked %d processes to save and stop", told)
            heard = True
        if left_seconds < 0:
            logger.warning("launch: still running at its time limit, ending it")
            command.end()
            code = TIME_IS_UP
            break
    command.clear_away()
    asked = asked or any(signum != SAVE for signum in inbox.take())
    if heard and code == 0 and not asked:
        code = TIME_IS_UP
    return Attempt(code, time.monotonic() - started, asked)


def pass_on(command: Command, signum: int, again: bool) -> None:
    """A signal to the launcher. The first SIGTERM or Ctrl-C goes to the ranks, which save; all else to the command."""
    name = signal.Signals(signum).name
    told = command.tell(signum, ranks_only=True) if signum in (signal.SIGTERM, signal.SIGINT) and not again else 0
    if told:
        logger.info("launch: %s, passed on to %d processes, which save and stop", name, told)
    else:
        logger.info("launch: %s, passed on to the command", name)
        command.send(signum)
