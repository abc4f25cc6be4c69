"""The exceptions that mean something beyond the place where they are raised."""


class BadInput(Exception):
    """Something the user gave can't be used. The message says what to do; the exit code is 2."""

    exit_code = 2


class GaveWay(Exception):
    """A worker group stopped by itself, with everything saved as far as there was time.

    `cause` is `preemption`, `resize`, `stop` or `roll-back`: it decides which budget is charged.
    """

    def __init__(self, cause: str, message: str):
        super().__init__(cause, message)
        self.cause = cause
        self.message = message

    def __str__(self) -> str:
        return self.message


class Unfinished(Exception):
    """The run stopped before its end with a good checkpoint: the same command goes on with it."""

    exit_code = 75


class RunFailed(Exception):
    """The run can't go on by itself. The message says why; the exit code is 1."""

    exit_code = 1


class NotFollowed(Exception):
    """Ctrl-C ended the following of a job that runs elsewhere. The message says what goes on."""

    exit_code = 130


def last_line(told: object) -> str:
    """The last line of an error or its text, where a traceback has the cause; else its type."""
    lines = [line.strip() for line in str(told).splitlines() if line.strip()]
    return lines[-1] if lines else type(told).__name__
