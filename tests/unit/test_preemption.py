"""Notices of a worker, the thread that looks for them, and the save that still fits."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cat_ray.training.preemption import (
    Notice,
    NoticeBoard,
    Poller,
    SaveTimes,
    choose_save,
    partners,
)

SOON, LATER, SOME_TIME = Notice("soon", 10.0), Notice("later", 20.0), Notice("some time", None)

# The board.


@pytest.mark.parametrize(
    ("posted", "expected"),
    [
        ([], None),
        ([SOME_TIME], SOME_TIME),
        ([SOON, LATER], SOON),
        ([LATER, SOON], SOON),
        ([SOME_TIME, LATER], LATER),
        ([LATER, SOME_TIME], LATER),
        ([SOON, Notice("as soon", 10.0)], SOON),
        ([SOME_TIME, Notice("SIGTERM", None)], SOME_TIME),
    ],
)
def test_the_earliest_deadline_wins_and_of_equal_ones_the_first(posted, expected):
    board = NoticeBoard()
    for notice in posted:
        board.post(notice)
    assert board.current() == expected


@given(st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1))
def test_no_posted_deadline_is_before_the_current_one(deadlines):
    board = NoticeBoard()
    for place, deadline in enumerate(deadlines):
        board.post(Notice(str(place), deadline))
    told = [math.inf if deadline is None else deadline for deadline in deadlines]
    assert board.current().reason == str(told.index(min(told)))


def test_a_cleared_board_knows_only_what_is_posted_afterwards():
    board = NoticeBoard()
    board.post(SOON)
    board.clear()
    assert board.current() is None
    board.post(LATER)
    assert board.current() == LATER


def test_a_signal_handler_may_post_while_the_thread_it_interrupts_reads_or_posts():
    board = NoticeBoard()

    class Interrupted(float):
        """A deadline that, when compared, is interrupted by an earlier notice."""

        def __lt__(self, other):
            board.post(SOON)
            return float(self) < other

        def __gt__(self, other):
            board.post(SOON)
            return float(self) > other

    def use() -> None:
        board.post(LATER)
        board.post(Notice("interrupted", Interrupted(15.0)))
        board.current()

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), "the board waits for itself"
    assert board.current() == SOON


def test_no_notice_of_several_threads_is_lost():
    board = NoticeBoard()
    together = threading.Barrier(4)

    def post(first: int) -> None:
        together.wait()
        for deadline in range(first, 0, -4):
            board.post(Notice(f"thread {first % 4}", deadline))
            assert board.current().deadline <= deadline

    threads = [threading.Thread(target=post, args=(200 + number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert board.current() == Notice("thread 1", 1)


# The poller.


class Source:
    """Tells what it is given, and when it was asked."""

    def __init__(self, tell: Callable[[int], Notice | None] = lambda poll: None):
        self.asked: list[float] = []
        self._tell = tell

    def poll(self) -> Notice | None:
        self.asked.append(time.monotonic())
        return self._tell(len(self.asked))


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until, "nothing happened in 5 s"
        time.sleep(0.002)


def test_a_notice_is_posted_at_the_first_poll_that_tells_it():
    board = NoticeBoard()
    source = Source(lambda poll: SOON if poll >= 3 else None)
    with Poller(source, board, 0.01):
        wait_for(board.current)
        assert board.current() == SOON
    assert len(source.asked) >= 3


def test_the_first_poll_is_at_once_and_leaving_does_not_wait_for_the_next():
    board = NoticeBoard()
    started = time.monotonic()
    with Poller(Source(lambda poll: SOON), board, 60.0):
        wait_for(board.current)
    assert time.monotonic() - started < 5


def test_between_two_polls_lie_as_many_seconds_as_asked_for():
    source = Source()
    with Poller(source, NoticeBoard(), 0.05):
        wait_for(lambda: len(source.asked) >= 4)
    assert all(later - earlier >= 0.049 for earlier, later in pairwise(source.asked))


def test_polling_goes_on_after_a_notice_and_an_earlier_one_replaces_it():
    board = NoticeBoard()
    with Poller(Source(lambda poll: SOON if poll >= 3 else LATER), board, 0.01):
        wait_for(lambda: board.current() == SOON)


def test_after_leaving_nothing_is_asked_or_posted():
    board, polling = NoticeBoard(), threading.Event()

    def slow(poll: int) -> Notice:
        polling.set()
        time.sleep(0.1)
        return SOON

    source = Source(slow)
    with Poller(source, board, 0.0):
        polling.wait(5)
    asked = len(source.asked)
    board.clear()
    time.sleep(0.15)
    assert (len(source.asked), board.current()) == (asked, None)


def test_a_poller_does_not_keep_a_process_alive():
    with Poller(Source(), NoticeBoard(), 60.0):
        [thread] = [each for each in threading.enumerate() if each.name == "preemption-notices"]
        assert thread.daemon


def test_an_exception_of_the_source_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_value))
    with Poller(Source(lambda poll: 1 // 0), NoticeBoard(), 60.0):
        wait_for(lambda: told)
    assert isinstance(told[0], ZeroDivisionError)


# The choice of the save.


@pytest.mark.parametrize(
    ("local", "storage", "left", "kind", "why"),
    [
        (4.0, 41.2, None, "storage", "no deadline is known"),
        (None, None, None, "storage", "no deadline is known"),
        (
            *(4.0, 41.2, 95.0, "storage"),
            "a save to storage takes 41.2 s (measured; 61.8 s with the margin), 95 s are left",
        ),
        (
            *(None, 20.0, 30.0, "storage"),
            "a save to storage takes 20 s (measured; 30 s with the margin), 30 s are left",
        ),
        (
            *(4.0, 41.2, 50.0, "peer"),
            "a save to storage takes 41.2 s (measured; 61.8 s with the margin), "
            "handing over 4 s (measured; 6 s with the margin), 50 s are left",
        ),
        (
            *(20.0, 41.2, 29.9, "none"),
            "a save to storage takes 41.2 s (measured; 61.8 s with the margin), "
            "handing over 20 s (measured; 30 s with the margin), 29.9 s are left",
        ),
        (
            *(4.0, 41.2, -7.0, "none"),
            "a save to storage takes 41.2 s (measured; 61.8 s with the margin), "
            "handing over 4 s (measured; 6 s with the margin), 0 s are left",
        ),
        (
            *(None, 41.2, 50.0, "none"),
            "a save to storage takes 41.2 s (measured; 61.8 s with the margin), "
            "handing over has not been measured yet, 50 s are left",
        ),
        (
            *(None, None, 60.0, "storage"),
            "no save has been measured yet, 60 s are left",
        ),
        (
            *(4.0, None, 0.5, "storage"),
            "no save has been measured yet, 0.5 s are left",
        ),
        (
            *(None, None, -7.0, "storage"),
            "no save has been measured yet, 0 s are left",
        ),
    ],
)
def test_the_save_that_fits_and_why(local, storage, left, kind, why):
    choice = choose_save(SaveTimes(local, storage), left, margin=1.5)
    assert (choice.kind, choice.why) == (kind, why)


seconds = st.floats(0, 1e4)
measured = st.one_of(st.none(), seconds)
margins = st.floats(1, 5)


@given(measured, measured, st.floats(-1e3, 1e5), margins)
def test_what_is_chosen_ends_in_time_as_far_as_that_was_measured(local, storage, left, margin):
    choice = choose_save(SaveTimes(local, storage), left, margin)
    if choice.kind == "storage":
        assert storage is None or storage * margin <= left
    if choice.kind == "peer":
        assert local * margin <= left


LASTING = {"none": 0, "peer": 1, "storage": 2}


@given(measured, measured, st.tuples(seconds, seconds).map(sorted), margins)
def test_more_time_is_never_a_reason_for_a_less_lasting_save(local, storage, left, margin):
    times = SaveTimes(local, storage)
    less, more = (LASTING[choose_save(times, each, margin).kind] for each in left)
    assert less <= more


# Who takes whose part.


@st.composite
def groups(draw) -> tuple[int, frozenset[int]]:
    world_size = draw(st.integers(1, 40))
    staying = draw(st.sets(st.integers(0, world_size - 1), min_size=1))
    return world_size, frozenset(range(world_size)) - staying


@given(groups())
def test_every_leaving_rank_has_a_partner_that_stays(group):
    world_size, leaving = group
    paired = partners(world_size, leaving)
    assert set(paired) == leaving
    assert set(paired.values()) <= set(range(world_size)) - leaving


@given(groups())
def test_no_partner_takes_two_parts_more_than_another(group):
    world_size, leaving = group
    taken = Counter(partners(world_size, leaving).values())
    counts = [taken[rank] for rank in range(world_size) if rank not in leaving]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("world_size", "leaving", "expected"),
    [
        (4, [], {}),
        (2, [0], {0: 1}),
        (4, [2, 3], {2: 0, 3: 1}),
        (4, [0, 1, 2], {0: 3, 1: 3, 2: 3}),
        (6, [0, 1, 2, 3], {0: 4, 1: 4, 2: 5, 3: 5}),
        # One machine of three leaves: half of its parts go to each of the others.
        (12, [4, 5, 6, 7], {4: 0, 5: 2, 6: 8, 7: 10}),
    ],
)
def test_partners_of_small_groups(world_size, leaving, expected):
    assert partners(world_size, frozenset(leaving)) == expected


@pytest.mark.parametrize("world_size", [1, 4])
def test_when_all_leave_there_are_no_partners(world_size):
    with pytest.raises(ValueError, match=f"all {world_size} workers leave"):
        partners(world_size, frozenset(range(world_size)))
