"""How an attempt ended, and whether there is to be another one: pure functions."""

import signal
from dataclasses import dataclass

from cat_ray.operations.outcome import EXIT_CODES

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 300.0
SIGNALLED = 128
# Ray's words for a driver that went with its machine or with the process that watched it.
LOST = (
    "JOB_SUPERVISOR_ACTOR_DIED",
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT",
    "JOB_SUPERVISOR_ACTOR_START_FAILURE",
    "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE",
)
OUTCOMES = {code: outcome for outcome, code in EXIT_CODES.items()}


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    Attributes:
        stopped: somebody asked Ray to stop it.
        code: of the command as Ray tells it, negative for a signal; None if Ray doesn't know.
        error_type: Ray's, where it has one.
        message: Ray's.
    """

    stopped: bool
    code: int | None
    error_type: str | None = None
    message: str = ""

    @property
    def exit_code(self) -> int:
        """What the follower ends with: the command's, as a shell tells it."""
        if self.stopped:
            return EXIT_CODES["unfinished"]
        if self.code is None:
            return EXIT_CODES["failed"]
        return SIGNALLED - self.code if self.code < 0 else self.code

    @property
    def killed_by(self) -> str | None:
        """The signal's name, if one ended the command."""
        number = self.exit_code - SIGNALLED
        return signal.Signals(number).name if number in set(signal.Signals) else None

    @property
    def word(self) -> str:
        """For people: `finished`, `failed`, `bad input`, `unfinished`, `stopped`, `killed`..."""
        if self.stopped:
            return "stopped"
        if self.killed_by:
            return f"killed by {self.killed_by}"
        if self.code is None:
            return "lost" if self.error_type in LOST else "not started"
        return OUTCOMES.get(self.exit_code, "failed")

    def __str__(self) -> str:
        # Where the command has a code its log says more.
        unsaid = self.code is None and not self.stopped and self.message
        return f"{self.word} ({self.message})" if unsaid else self.word


def goes_on(ending: Ending, retry_failures: bool) -> bool:
    """Whether the same command may do better.

    It does after exit code 75 and where the command was killed or lost; after a failure only if
    that was asked for; never after bad input, nor if somebody stopped it.
    """
    if ending.stopped or ending.exit_code == EXIT_CODES["finished"]:
        return False
    if ending.exit_code == EXIT_CODES["unfinished"] or ending.killed_by:
        return True
    if ending.code is None:
        return ending.error_type in LOST
    return ending.exit_code == EXIT_CODES["failed"] and retry_failures


def pause_seconds(retries: int) -> float:
    """How long to wait before the retry of this number, counted from 1."""
    return min(FIRST_PAUSE_SECONDS * 2 ** (retries - 1), LONGEST_PAUSE_SECONDS)
