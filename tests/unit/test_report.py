"""The report of a run: one page that needs nothing else, whatever the run has written so far."""

import base64
import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from cat_ray.checkpoint.layout import GENERATOR, State
from cat_ray.operations.identity import CONFIG_NAME
from cat_ray.operations.journal import METRICS, read_rows
from cat_ray.operations.report import GRIDS, GRIDS_SHOWN, write_report
from cat_ray.storage import Location, locate

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
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.links += [values[n] for n in ("src", "href", "srcset", "action") if n in values]
        if tag == "img":
            encoded = values["src"].removeprefix("data:image/png;base64,")
            self.pictures[values["alt"]] = base64.b64decode(encoded, validate=True)

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
