"""How an attempt ended, and whether there is to be another one: pure functions."""

import signal
from dataclasses import dataclass

from cat_ray.operations.outcome import EXIT_CODES

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 300.0
SIGNALLED = 128
OUTCOMES = {code: outcome for outcome, code in EXIT_CODES.items()}


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    Attributes:
        stopped: somebody asked Ray to stop it.
        code: of the command as Ray tells it, negative for a signal; None if it didn't come up, or
            went with its machine.
        message: Ray's.
    """

    stopped: bool
    code: int | None
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
        """For people: the outcome, or `stopped`, `killed by ...` or `lost`."""
        if self.stopped:
            return "stopped"
        if self.killed_by:
            return f"killed by {self.killed_by}"
        if self.code is None:
            return "lost"
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
    if ending.stopped:
        return False
    # What is sent can't keep a command from coming up: it is the cluster that failed.
    if ending.code is None or ending.killed_by:
        return True
    again = ("unfinished", "failed") if retry_failures else ("unfinished",)
    return ending.exit_code in (EXIT_CODES[outcome] for outcome in again)


def pause_seconds(retries: int) -> float:
    """How long to wait before the retry of this number, counted from 1."""
    return min(FIRST_PAUSE_SECONDS * 2 ** (retries - 1), LONGEST_PAUSE_SECONDS)
