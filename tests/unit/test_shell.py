"""Whatever ends a command is one line and an exit code; a traceback comes only when asked for."""

import errno

import pytest
import typer

from cat_ray.cli import shell
from cat_ray.errors import (
    BadInput,
    NotFollowed,
    RunFailed,
    StorageDown,
    StorageFull,
    Unfinished,
)


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    ("error", "exit_code", "told"),
    [
        (BadInput("no such key"), 2, "cat-ray: no such key\n"),
        (StorageDown("away"), 75, "cat-ray: away\n"),
        (StorageFull("full"), 75, "cat-ray: full\n"),
        (Unfinished("stopped"), 75, "cat-ray: stopped\n"),
        (RunFailed("failed"), 1, "cat-ray: failed\n"),
        (NotFollowed("goes on"), 130, "cat-ray: goes on\n"),
        (KeyboardInterrupt(), 130, "cat-ray: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
            75,
            "no space left for /tmp/x",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 75, "no space left for temporary files"),
        (TypeError("ours"), 1, "cat-ray: unexpected TypeError: ours (run it again"),
        (BadInput("\x1b[31mred"), 2, "cat-ray: \\x1b[31mred\n"),
    ],
)
def test_a_command_ends_with_one_line_and_the_exit_code(
    monkeypatch, capsys, debug, error, exit_code, told
):
    monkeypatch.setattr(shell.DEBUG, "is_set", lambda: debug)
    with pytest.raises(typer.Exit) as ended, shell.speaking_plainly():
        raise error
    assert ended.value.exit_code == exit_code
    shown = capsys.readouterr().err
    assert told in shown
    assert ("Traceback" in shown) == debug
    if not debug:
        assert shown.count("\n") == 1
