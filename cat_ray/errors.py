"""The exceptions that mean something beyond the place where they are raised."""


class ExpectedError(Exception):
    """A foreseen end of a command: its message is shown without a traceback, with `exit_code`."""

    exit_code = 1


class BadInput(ExpectedError):
    """Something the user gave can't be used. The message says what to do."""

    exit_code = 2


class NotFound(BadInput):
    """There is no such file."""


class Damaged(BadInput):
    """A file was read, and its content is not what its writer put there."""


class StorageDown(ExpectedError):
    """The storage doesn't answer, or not as it should: a later try may succeed.

    Not a `BadInput`: the same command goes on once the storage is back.
    """

    exit_code = 75


class StorageFull(ExpectedError):
    """There is no space left. Once there is, the same command goes on."""

    exit_code = 75


class Unfinished(ExpectedError):
    """The run stopped before its end with a good checkpoint: the same command goes on with it."""

    exit_code = 75


class RunFailed(ExpectedError):
    """The run can't go on by itself. The message says why."""


class NotFollowed(ExpectedError):
    """Ctrl-C ended the following of a job that runs elsewhere. The message says what goes on."""

    exit_code = 130


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


def last_line(told: object) -> str:
    """The last line of an error or its text, where a traceback has the cause; else its type."""
    lines = [line.strip() for line in str(told).splitlines() if line.strip()]
    return lines[-1] if lines else type(told).__name__


def printable(text: str) -> str:
    """The text without characters that a terminal obeys: foreign names may hold escape codes."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else f"\\x{ord(char):02x}" for char in text
    )
