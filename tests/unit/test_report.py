"""The report of a run: one page that needs nothing else, whatever the run has written so far."""

import base64
import io
import json
import math
import re
import tempfile
import warnings
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from cat_ray.checkpoint.layout import GENERATOR, STATE, State
from cat_ray.evaluation import plot
from cat_ray.operations.identity import CONFIG_NAME
from cat_ray.operations.journal import METRICS, read_rows
from cat_ray.operations.report import GRIDS, GRIDS_SHOWN, write_report
from cat_ray.storage import Location, locate

HOSTILE = (
    "<script>alert(1)</script>",
    "</td></table><script src=//x>",
    "\"'><img src=x onerror=alert(1)>",
    "</title></style></pre><b>",
    "<!--",
    "&lt;b&gt;",
    "$\\frac$ $",
    "\x1b[2J\x00\u202e\ud800",
    "a\r\nb\tc",
)
# Of the page itself; what a row brings is none of them.
TAGS = {
    *("html", "meta", "title", "style", "h1", "h2", "p", "div", "figure", "figcaption", "img"),
    *("table", "tr", "td", "pre"),
}

CONFIG = "run:\n  folder: runs/<script>alert('R&D')</script>\n"


def train_row(images: int, session: str = "a") -> dict:
    return {
        "kind": "train",
        "session": session,
        "images": images,
        "epoch": images / 64,
        "workers": 2,
        "broken_samples": 3,
        "d_loss": 0.5,
        "g_loss": 0.7,
        "r1": 0.1,
        "discrepancy_1": 0.2,
        "discrepancy_2": 0.1,
        "images_per_second": 123.4,
        "data_wait_share": 0.01,
    }


def evaluation_row(images: int, accuracy: float) -> dict:
    return {
        "kind": "evaluation",
        "session": "a",
        "images": images,
        "samples": 1000,
        "class_accuracy": accuracy,
        "recall": 0.25,
    }


ROWS = [
    train_row(32),
    evaluation_row(32, 0.125),
    {"kind": "checkpoint", "session": "a", "images": 32, "location": "x", "seconds": 0.1},
    {"kind": "broken", "session": "a", "images": 32, "samples": ["<b>0.tar</b>: k: broken"]},
    train_row(1500, "b"),
    evaluation_row(1500, 0.875),
]


def write_rows(run: Location, rows: Sequence[dict], end: str = "") -> None:
    (run / METRICS).write(("".join(json.dumps(row) + "\n" for row in rows) + end).encode())


def write_grids(run: Location, count: int) -> None:
    """Grids that differ: the one after n * 100 images has the side n + 1."""
    for n in range(count):
        content = io.BytesIO()
        Image.new("L", (n + 1, n + 1)).save(content, format="PNG")
        (run / GRIDS / f"images-{n * 100:012d}.png").write(content.getvalue())


@pytest.fixture
def begun(tmp_path: Path) -> Location:
    """A run folder before the first row: its page has no curves and costs nothing."""
    place = locate(str(tmp_path / "run"))
    (place / CONFIG_NAME).write(CONFIG.encode())
    return place


class Page(HTMLParser):
    """A page's tags, its text by the tag that it stands in, and its pictures by description."""

    def __init__(self, run: Location):
        super().__init__()
        self.source = write_report(run).read().decode()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.pictures: dict[str, bytes] = {}
        self.attributes: list[str] = []
        self.comments: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.attributes += values
        self.links += [values[n] for n in ("src", "href", "srcset", "action") if n in values]
        if tag == "img":
            encoded = values["src"].removeprefix("data:image/png;base64,")
            self.pictures[values["alt"]] = base64.b64decode(encoded, validate=True)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.texts.append((self.tags[-1], data))

    def text(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]

    def grids(self) -> dict[str, int]:
        """The side of each grid that is shown, by description."""
        return {
            name: Image.open(io.BytesIO(content)).width
            for name, content in self.pictures.items()
            if name.startswith("samples after")
        }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, save_checkpoint) -> Page:
    """The page of a run after two sessions."""
    run = locate(str(tmp_path_factory.mktemp("report") / "run <1>"))
    (run / CONFIG_NAME).write(CONFIG.encode())
    write_rows(run, ROWS)
    write_grids(run, 3)
    state = State(32, 0, "digest", CONFIG, {"torch": "2.13<0"})
    save_checkpoint(run, state, {GENERATOR: {"gain": torch.ones(1)}})
    return Page(run)


def test_the_page_needs_nothing_from_elsewhere(page):
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", page.source)


def test_what_others_wrote_is_shown_and_never_run(page):
    assert page.text("pre") == [CONFIG]
    assert "<script" not in page.source
    assert page.text("title") == ["cat-ray: run <1>"]
    assert {"torch", "2.13<0"} <= set(page.text("td"))


def test_the_summary_is_that_of_the_last_line(page):
    (summary,) = [text for text in page.text("p") if "workers" in text]
    for words in ("1,500 images", "23.4 epochs", "2 workers", "123 images/s", "2 sessions"):
        assert words in summary
    assert "3 broken samples" in summary


def test_first_and_last_measurement_stand_side_by_side(page):
    cells = page.text("td")
    at = cells.index("class accuracy")
    assert cells[at : at + 3] == ["class accuracy", "0.125", "0.875"]
    assert cells[cells.index("images") + 1 :][:2] == ["32", "1,500"]
    assert "session" not in cells


def test_there_is_a_curve_for_each_figure_that_was_measured(page):
    titles = [name for name in page.pictures if not name.startswith("samples")]
    assert titles == [
        "Losses",
        "Penalty",
        "Distance of each stage to the final output",
        "Class accuracy, spread, recall, precision",
        "Images per second",
        "Share of time spent waiting for data",
    ]


def test_pictures_are_whole_pngs(page):
    assert len(page.pictures) == 6 + 3
    for content in page.pictures.values():
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            assert image.format == "PNG"


def test_the_page_lies_in_the_run_folder_and_replaces_the_last_one(begun):
    place = write_report(begun)
    assert place == begun / "report.html"
    before = place.read()
    assert write_report(begun).read() == before
    write_grids(begun, 1)
    assert write_report(begun).read() != before


@pytest.mark.parametrize("count", [0, 1, 2, GRIDS_SHOWN, GRIDS_SHOWN + 1, 40])
def test_few_grids_are_shown_evenly_from_the_first_to_the_last(begun, count):
    write_grids(begun, count)
    shown = Page(begun).grids()
    assert len(shown) == min(count, GRIDS_SHOWN)
    sides = list(shown.values())
    assert sides == sorted(sides)
    if count:
        assert (sides[0], sides[-1]) == (1, count)
    assert list(shown) == [f"samples after {(side - 1) * 100:,} images" for side in sides]
    gaps = [b - a for a, b in pairwise(sides)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_a_grid_that_is_being_written_is_not_shown(begun):
    write_grids(begun, 3)
    # What a worker's Location.write leaves for a moment, or for good if it is killed.
    (begun / GRIDS / ".images-000000000300.png.partial").write(b"half")
    assert len(Page(begun).grids()) == 3


@pytest.mark.parametrize("end", ['{"kind": "train", "ima', '{"kind"', "{"])
def test_a_line_that_is_being_written_is_left_out(begun, end):
    write_rows(begun, ROWS, end)
    assert read_rows(begun) == ROWS


def test_a_run_that_has_only_begun_has_a_page(begun):
    page = Page(begun)
    assert "Nothing was trained yet." in page.text("p")
    assert "Nothing was measured: evaluation.protocol is none." in page.text("p")
    assert page.text("pre") == [CONFIG]
    assert page.pictures == {}


hostile = st.sampled_from(HOSTILE) | st.text(max_size=20)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**40), 2**63])
    | st.floats()
    | hostile,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hostile, inner, max_size=2),
    max_leaves=5,
)
FIGURES = ("d_loss", "r1", "discrepancy_1", "images_per_second", "precision", "fid", "recall")
keys = (
    st.sampled_from(
        (
            *("kind", "session", "images", "epoch", "workers", "broken_samples", "d_loss", "fid"),
            *(
                "images_per_second",
                "recall",
                "message",
                "metric",
                "checkpoint",
                "best",
                "precision",
            ),
        )
    )
    | hostile
    | st.tuples(st.sampled_from(FIGURES), hostile).map("".join)
)
MEASURED = {"kind": "measured", "session": "a", "images": 32, "metric": "fid", "fid": 3.5}
EVENT_ROW = {"kind": "event", "session": "a", "images": 32, "message": "rolled back"}
# With few curves, which take most of the time.
PLAIN = {name: train_row(32)[name] for name in ("kind", "session", "images", "epoch", "workers")}
sound_rows = st.sampled_from(
    [
        *(ROWS[1], ROWS[3], PLAIN, PLAIN | {"d_loss": 0.5}),
        MEASURED | {"checkpoint": "c", "best": ["c"], "recall": 0.5},
        EVENT_ROW,
    ]
)


def altered(row: dict, changes: dict, without: set[str]) -> dict:
    return {name: value for name, value in (row | changes).items() if name not in without}


foreign_rows = st.builds(
    altered,
    sound_rows,
    st.dictionaries(keys, values, max_size=4),
    st.sets(st.sampled_from(["session", "images", "epoch", "workers", "best", "metric"])),
)


def assert_shows_any_rows(rows: list[dict], config: str) -> None:
    with tempfile.TemporaryDirectory(prefix="<script>'") as folder:
        run = locate(folder)
        (run / CONFIG_NAME).write(config.encode(errors="surrogatepass"))
        write_rows(run, rows)
        with warnings.catch_warnings():
            # A font hasn't all characters.
            warnings.simplefilter("ignore", UserWarning)
            page = Page(run)
    assert set(page.tags) <= TAGS
    assert set(page.attributes) <= {"lang", "charset", "name", "content", "class", "alt", "src"}
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert page.comments == []
    assert not {char for char in page.source if not char.isprintable()} - {"\n", "\t"}


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(foreign_rows, min_size=1, max_size=4), config=hostile)
@example(rows=[train_row(32) | {"workers": HOSTILE[0], "broken_samples": HOSTILE[2]}], config="")
@example(rows=[train_row(32) | {"images_per_second": None, "epoch": [], "session": {}}], config="")
@example(rows=[train_row(32) | {"d_loss$\\frac$": 1, "d_loss\ud800": 2}], config="\ud800")
@example(rows=[train_row(32) | {"images": 10**400}, train_row(1) | {"r1": -1e308}], config="")
@example(rows=[{"kind": ["train"]}, {"kind": "train"}, {}], config="")
def test_whatever_rows_hold_is_shown_as_text_and_breaks_nothing(rows: list[dict], config: str):
    assert_shows_any_rows(rows, config)


@pytest.mark.long
@settings(
    max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(foreign_rows, min_size=1, max_size=4), config=hostile)
def test_whatever_rows_hold_is_text_ten_thousand_times(
    rows: list[dict], config: str, monkeypatch: pytest.MonkeyPatch
):
    # Drawing is nearly all of the time, and done in the short form.
    monkeypatch.setattr(plot, "to_png", lambda figure, dots: b"")
    assert_shows_any_rows(rows, config)


@pytest.mark.parametrize("name", ["workers", "broken_samples", "epoch", "images_per_second"])
@pytest.mark.parametrize("text", HOSTILE[:4])
def test_what_the_summary_says_is_text_too(begun: Location, name: str, text: str):
    write_rows(begun, [PLAIN | {name: text}])
    page = Page(begun)
    (summary,) = [told for told in page.text("p") if "workers" in told]
    assert text in summary
    assert set(page.tags) <= TAGS


def test_a_figure_that_is_not_finite_at_the_end_keeps_its_curve(begun: Location):
    write_rows(begun, [train_row(32), train_row(64) | {"r1": math.nan, "d_loss": math.inf}])
    assert {"Penalty", "Losses"} <= Page(begun).pictures.keys()


def test_of_a_damaged_checkpoint_it_is_said_that_versions_are_not_known(begun, save_checkpoint):
    save_checkpoint(begun, State(32, 0, "", CONFIG, {}), {GENERATOR: {"gain": torch.ones(1)}})
    (checkpoint,) = (begun / "checkpoints").folders()
    (checkpoint / STATE).write(b"[" * len((checkpoint / STATE).read()))
    shown = Page(begun).text("td")
    assert "not known" in shown
    assert any(f"{checkpoint.uri}/state.json is damaged" in text for text in shown), shown
