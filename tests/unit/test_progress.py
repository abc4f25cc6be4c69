"""What a person sees of a run: a line for each row, and all that is done again told again."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cat_ray.operations import progress
from cat_ray.operations.journal import EVENT, METRICS, Journal, Row, read_rows
from cat_ray.operations.progress import Progress, describe
from cat_ray.storage import Location, locate

PATIENCE_SECONDS = 60
TOTAL = 1000


def row(kind: str, images: int, session: str = "a", **values: Any) -> Row:
    return {"kind": kind, "session": session, "images": images, **values}


def trained(images: int, d_loss: float = 0.5) -> Row:
    return row(
        "train",
        images,
        d_loss=d_loss,
        g_loss=0.75,
        r1=1.0,
        r2=2.0,
        consistency=0.125,
        images_per_second=123.4,
        data_wait_share=0.01,
        eta_seconds=125.0,
    )


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


def write(run: Location, session: str, start: int, *rows: Row) -> None:
    """A worker group goes on from a place and writes rows."""
    journal = Journal(run, session, start)
    for each in rows:
        values = {name: value for name, value in each.items() if name not in row("", 0)}
        journal.append(each["kind"], each["images"], **values)
    journal.close()


# A row as a line.


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            trained(250),
            "      250 images  25%  D 0.500  G 0.750  R1 1.000  R2 2.000  consistency 0.125  "
            "123 images/s  data wait 1.0%  ETA 2:05",
        ),
        (
            {**trained(250), "alignment": 0.25},
            "      250 images  25%  D 0.500  G 0.750  R1 1.000  R2 2.000  consistency 0.125  "
            "alignment 0.250  123 images/s  data wait 1.0%  ETA 2:05",
        ),
        (
            row("checkpoint", 1_000_000, location="s3://b/c", seconds=1.25, stall_seconds=0.1),
            "1,000,000 images  saved s3://b/c in 1.2 s",
        ),
        (
            row("broken", 32, samples=["0.tar: k: no image", "1.tar: l: no class"]),
            "       32 images  skipped 2 broken samples: 0.tar: k: no image; 1.tar: l: no class",
        ),
        (
            row(EVENT, 640, message="worker group 3f9a1c, 2 workers, starts from the beginning"),
            "      640 images  worker group 3f9a1c, 2 workers, starts from the beginning",
        ),
        (
            row(EVENT, 640, message="a drain: handing over, 59 s are left"),
            "      640 images  a drain: handing over, 59 s are left",
        ),
        (row("something new", 640), None),
    ],
)
def test_a_row_is_a_line_for_a_person_or_none(given, line):
    assert describe(given, TOTAL) == line


# What is kept of an earlier group.


@pytest.mark.parametrize(
    ("start", "kept"),
    [(0, []), (32, [32]), (63, [32]), (64, [32, 64, 64]), (96, [32, 64, 64, 96])],
)
def test_rows_past_the_place_where_a_run_goes_on_are_dropped(run, start, kept):
    saved = row("checkpoint", 64, location="x", seconds=1.0)
    write(run, "a", 0, trained(32), trained(64), saved, trained(96))
    write(run, "a", start)
    assert [each["images"] for each in read_rows(run)] == kept


def test_what_happened_is_never_dropped(run):
    write(run, "a", 0, row(EVENT, 0, message="begins"), trained(32), row(EVENT, 48, message="ends"))
    write(run, "a", 0, row(EVENT, 0, message="begins again"))
    assert [each["message"] for each in read_rows(run)] == ["begins", "ends", "begins again"]


def test_what_is_done_again_stands_where_the_dropped_rows_stood(run):
    write(run, "a", 0, trained(32, 0.1), trained(64, 0.2))
    write(run, "b", 32, trained(64, 0.3), trained(96, 0.4))
    rows = [(each["images"], each["d_loss"]) for each in read_rows(run)]
    assert rows == [(32, 0.1), (64, 0.3), (96, 0.4)]


@pytest.mark.parametrize("end", ['{"kind": "train"', '{"kind": "train", "images": 3'])
def test_a_row_that_is_being_written_is_not_read_yet(run, end):
    write(run, "a", 0, trained(32))
    assert run.local_path is not None
    with (run.local_path / METRICS).open("a") as file:
        file.write(end)
    assert [each["images"] for each in read_rows(run)] == [32]


def test_a_run_without_a_row_has_none(run):
    assert read_rows(run) == []


# What is shown while a run goes on.


@pytest.fixture
def shown(monkeypatch, capsys) -> Callable[..., list[str]]:
    """The lines shown so far, waiting until one of them tells something; polls often."""
    monkeypatch.setattr(progress, "LOCAL_POLL_SECONDS", 0.002)
    lines: list[str] = []

    def wait_for(words: str = "") -> list[str]:
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            lines.extend(capsys.readouterr().out.splitlines())
            if any(words in line for line in lines):
                return lines
            assert time.monotonic() < until, f"no line tells {words!r}: {lines}"
            time.sleep(0.002)

    return wait_for


def test_each_row_is_shown_once_as_soon_as_it_is_there(run, shown):
    write(run, "earlier", 0, trained(16, 0.875))
    with Progress(run, "a", TOTAL):
        write(run, "a", 16, trained(32, 0.125))
        shown("D 0.125")
        write(run, "a", 32, row(EVENT, 32, message="an event"))
        shown("an event")
    lines = shown("an event")
    assert [line.split("images")[0].strip() for line in lines] == ["32", "32"]


def test_rows_that_are_dropped_and_done_again_are_shown_again(run, shown):
    begins = row(EVENT, 0, message="the first group starts")
    again = row(EVENT, 32, message="the second group starts")
    with Progress(run, "a", TOTAL):
        write(run, "a", 0, begins, trained(32, 0.125), trained(64, 0.25))
        shown("D 0.250")
        write(run, "a", 32, again, trained(64, 0.375), trained(96, 0.5))
        shown("D 0.500")
    lines = shown("D 0.500")
    told = ["first group", "D 0.125", "D 0.250", "second group", "D 0.375", "D 0.500"]
    assert len(lines) == len(told)
    assert all(words in line for words, line in zip(told, lines, strict=True))


def test_what_is_written_last_is_shown_before_the_end(run, shown, monkeypatch):
    monkeypatch.setattr(progress, "LOCAL_POLL_SECONDS", PATIENCE_SECONDS)
    with Progress(run, "a", TOTAL):
        write(run, "a", 0, trained(1000))
    assert "100%" in shown("1,000 images")[0]


def test_an_object_store_is_asked_less_often(run, shown, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(progress, "REMOTE_POLL_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(progress, "read_rows", lambda place: asked.append(place) or [])
    remote = Location(None, "run", "s3://bucket/run")  # pyright: ignore[reportArgumentType]
    with Progress(remote, "a", TOTAL):
        time.sleep(0.05)
        assert asked == []
    assert asked == [remote]


def test_who_else_wants_them_is_told_all_rows_and_when_it_is_over(run, shown):
    told: list[tuple[list[int], bool]] = []
    write(run, "earlier", 0, trained(16))
    with Progress(
        run, "a", TOTAL, lambda rows, last: told.append(([r["images"] for r in rows], last))
    ):
        write(run, "a", 16, trained(32))
        shown("32 images")
    assert told[-1] == ([16, 32], True)
    assert [last for _, last in told] == [False] * (len(told) - 1) + [True]


@pytest.mark.parametrize(
    "values",
    [{"kind": "train"}, {"kind": "checkpoint"}, {"kind": "measured", "best": 3}, {"kind": "new"}],
)
def test_a_row_of_something_else_ends_nothing(run, capsys, values):
    journal = Journal(run, "a", 0)
    foreign = {"session": "a", "images": 32, **values}
    (run / METRICS).write(json.dumps(foreign).encode() + b"\n")
    with Progress(run, "a", 64):
        journal.append(EVENT, 64, message="goes on")
    assert "goes on" in capsys.readouterr().out


def test_names_from_the_data_reach_no_terminal_as_commands(run, capsys):
    with Progress(run, "a", 64):
        Journal(run, "a", 0).append("broken", 32, samples=["\x1b]0;title\x07a.tar: [bold]x[/bold]"])
    shown = capsys.readouterr().out
    assert "\\x1b]0;title\\x07a.tar: [bold]x[/bold]" in shown
    assert "\x1b]" not in shown
