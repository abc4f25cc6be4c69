"""The one exception that speaks to the person who started the command."""


class BadInput(Exception):
    """Something the user gave can't be used. The message says what to do; the exit code is 2."""

    exit_code = 2
