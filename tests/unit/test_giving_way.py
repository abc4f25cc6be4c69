"""What a worker group does before it ends itself: which save it makes, and what it says of it."""

from dataclasses import replace
from itertools import permutations

import pytest

from cat_ray.training.giving_way import Situation, decide, leaving, longest
from cat_ray.training.preemption import Notice, SaveTimes

NOW = 1000.0
MARGIN = 1.5
# With the margin a save to storage takes 60 s, handing over 6 s.
MEASURED = SaveTimes(local_seconds=4.0, storage_seconds=40.0)
UNMEASURED = SaveTimes(None, None)


def staying(times: SaveTimes = MEASURED, with_driver: bool = False) -> Situation:
    return Situation(None, times, "a node that stays", with_driver)


def going(
    seconds: float | None,
    reason: str = "a drain",
    times: SaveTimes = MEASURED,
    with_driver: bool = False,
) -> Situation:
    deadline = None if seconds is None else NOW + seconds
    return Situation(Notice(reason, deadline), times, f"a node of {reason}", with_driver)


# Nobody's machine goes.


@pytest.mark.parametrize("times", [UNMEASURED, MEASURED, SaveTimes(1e6, 1e6)])
@pytest.mark.parametrize("with_driver", [False, True])
@pytest.mark.parametrize(
    ("cause", "told"),
    [
        ("resize", "the number of nodes changed: saving"),
        ("stop", "asked to stop: saving"),
    ],
)
def test_who_is_asked_to_resize_or_to_stop_always_saves(cause, told, with_driver, times):
    situations = [staying(times), staying(times, with_driver)]
    decision = decide(situations, cause, MARGIN, NOW)
    assert (decision.cause, decision.choice.kind, decision.told) == (cause, "storage", told)


# A machine goes.


@pytest.mark.parametrize(
    ("seconds", "kind", "told"),
    [
        (None, "storage", "a drain: saving, no deadline is known"),
        (
            *(60.0, "storage"),
            "a drain: saving, a save to storage takes 40 s (measured; 60 s with the margin), "
            "60 s are left",
        ),
        (
            *(59.0, "peer"),
            "a drain: handing over, a save to storage takes 40 s (measured; 60 s with the "
            "margin), handing over 4 s (measured; 6 s with the margin), 59 s are left",
        ),
        (
            *(5.0, "none"),
            "a drain: not saving, a save to storage takes 40 s (measured; 60 s with the "
            "margin), handing over 4 s (measured; 6 s with the margin), 5 s are left",
        ),
    ],
)
def test_what_is_saved_is_what_there_is_time_for_and_the_numbers_are_told(seconds, kind, told):
    decision = decide([staying(), going(seconds)], "preemption", MARGIN, NOW)
    assert (decision.cause, decision.choice.kind, decision.told) == ("preemption", kind, told)


def test_the_margin_is_the_configurations():
    situations = [staying(), going(60.0)]
    kinds = [decide(situations, "preemption", margin, NOW).choice.kind for margin in (1.5, 1.6, 20)]
    assert kinds == ["storage", "peer", "none"]


@pytest.mark.parametrize(
    ("deadlines", "kind", "reason"),
    [
        ({"first": 5.0, "second": 100.0}, "none", "first"),
        ({"first": 100.0, "second": 30.0, "third": 80.0}, "peer", "second"),
        ({"first": 100.0, "second": 90.0}, "storage", "second"),
        ({"first": None, "second": 30.0}, "peer", "second"),
        ({"first": None, "second": None}, "storage", "first"),
    ],
)
def test_the_earliest_deadline_decides(deadlines, kind, reason):
    goes = [going(seconds, name) for name, seconds in deadlines.items()]
    decision = decide([staying(), *goes], "preemption", MARGIN, NOW)
    assert decision.choice.kind == kind
    assert decision.told.startswith(f"{reason}: ")


def test_whose_rank_has_the_deadline_does_not_matter():
    situations = [staying(), going(30.0, "soon"), going(90.0, "later"), going(None, "once")]
    decisions = {
        decide(order, "preemption", MARGIN, NOW) for order in map(list, permutations(situations))
    }
    assert len(decisions) == 1


@pytest.mark.parametrize("slow", [0, 1])
def test_the_slowest_workers_times_decide_even_if_its_machine_stays(slow):
    times = [MEASURED, MEASURED]
    times[slow] = SaveTimes(local_seconds=21.0, storage_seconds=41.0)
    decision = decide([going(60.0, times=times[0]), staying(times[1])], "preemption", MARGIN, NOW)
    assert decision.choice.kind == "peer"
    assert "handing over 21 s" in decision.told


def test_before_the_first_save_was_measured_one_is_tried():
    situations = [going(1.0, times=UNMEASURED), staying(UNMEASURED)]
    assert decide(situations, "preemption", MARGIN, NOW).choice.kind == "storage"


@pytest.mark.parametrize("seconds", [None, 100.0, 30.0, 1.0])
@pytest.mark.parametrize("cause", ["preemption", "resize", "stop"])
def test_a_run_whose_drivers_machine_goes_stops(cause, seconds):
    situations = [staying(), going(seconds, with_driver=True), going(2000.0, "another")]
    assert decide(situations, cause, MARGIN, NOW).cause == "stop"


def test_the_drivers_machine_goes_though_only_another_worker_there_was_told():
    told, beside = going(100.0), replace(going(100.0), notice=None, with_driver=True)
    assert decide([beside, told], "preemption", MARGIN, NOW).cause == "stop"


def test_a_run_whose_drivers_machine_stays_goes_on_elsewhere():
    situations = [staying(with_driver=True), going(100.0)]
    assert decide(situations, "preemption", MARGIN, NOW).cause == "preemption"


@pytest.mark.parametrize("cause", ["resize", "stop"])
def test_a_notice_that_comes_while_others_ask_has_a_say_in_the_save_alone(cause):
    decision = decide([staying(), going(5.0)], cause, MARGIN, NOW)
    assert (decision.cause, decision.choice.kind) == (cause, "none")
    assert decision.told.startswith("a drain: not saving")


# Handing over.


def test_parts_are_handed_over_only_if_somebody_stays():
    beside = replace(going(30.0), notice=None)
    assert decide([staying(), going(30.0), beside], "preemption", MARGIN, NOW).choice.kind == "peer"
    for situations in ([going(30.0)], [going(30.0), beside], [going(30.0), going(90.0, "b")]):
        decision = decide(situations, "preemption", MARGIN, NOW)
        assert decision.choice.kind == "none"
        assert decision.told.startswith("a drain: not saving")
        assert decision.told.endswith("30 s are left, and no worker stays")


@pytest.mark.parametrize(
    ("nodes", "told", "expected"),
    [
        ("aabb", [], set()),
        ("aabb", [0], {0, 1}),
        ("aabb", [3], {2, 3}),
        ("abab", [1], {1, 3}),
        ("aabb", [1, 2], {0, 1, 2, 3}),
        ("abc", [0, 2], {0, 2}),
    ],
)
def test_all_workers_of_a_machine_leave_with_it_whoever_was_told(nodes, told, expected):
    notice = Notice("a drain", None)
    situations = [
        Situation(notice if rank in told else None, MEASURED, node, False)
        for rank, node in enumerate(nodes)
    ]
    assert leaving(situations) == expected


# The longest times.


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([], (None, None)),
        ([(None, None)], (None, None)),
        ([(None, None), (None, None)], (None, None)),
        ([(1.0, 2.0)], (1.0, 2.0)),
        ([(1.0, 20.0), (3.0, 10.0)], (3.0, 20.0)),
        ([(None, 20.0), (3.0, None)], (3.0, 20.0)),
        ([(0.0, None), (None, None)], (0.0, None)),
    ],
)
def test_the_longest_of_each_time_that_anyone_measured(times, expected):
    assert longest(SaveTimes(*each) for each in times) == SaveTimes(*expected)
