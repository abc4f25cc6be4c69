"""`report.html`: one self-contained page that shows how a run went."""

import base64
import html
import math
import re
import reprlib
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from cat_ray.checkpoint.read import newest, read_state
from cat_ray.errors import Damaged, NotFound, printable
from cat_ray.evaluation import plot
from cat_ray.operations.identity import CONFIG_NAME
from cat_ray.operations.journal import EVENT, Row, read_rows
from cat_ray.storage import Location

REPORT = "report.html"
GRIDS = "grids"
GRID_NAME = re.compile(r"images-(\d+)\.png")
GRIDS_SHOWN = 6
CURVES_SHOWN = 64
LABEL_CHARACTERS = 60
# No figure of a float32 is greater but infinity; a picture's axes would break with one that is.
GREATEST = 3.5e38

CURVES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Losses", "train", ("d_loss", "g_loss")),
    ("Penalty", "train", ("r1", "r2")),
    ("Mean logits", "train", ("real_logit", "fake_logit")),
    ("Consistency term", "train", ("consistency",)),
    ("Distance of each stage to the final output", "train", ("discrepancy_",)),
    ("Rewrite from stage to stage", "train", ("rewrite_",)),
    ("Direction towards the final output (cosine)", "train", ("direction_",)),
    ("DINOv2 alignment", "train", ("alignment",)),
    (
        "Class accuracy, spread, recall, precision",
        "evaluation",
        ("class_accuracy", "within_class_spread", "recall", "precision"),
    ),
    ("Frechet distance on pixel PCA (not FID)", "evaluation", ("frechet_pixel_pca",)),
    ("Frechet distance of checkpoints", "measured", ("fid", "fd_", "pixels")),
    ("Precision and recall of checkpoints", "measured", ("precision", "recall")),
    ("Images per second", "train", ("images_per_second",)),
    ("Share of time spent waiting for data", "train", ("data_wait_share",)),
    ("Share of time spent on figures", "train", ("report_share", "agreement_share")),
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
       color: #1c2128; background: #fff }
h1 { margin-bottom: 0 } h2 { border-bottom: 1px solid #d0d7de; margin-top: 2.5rem }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1rem }
.curves img, .grids img { width: 100% } .grids img { image-rendering: pixelated }
figure { margin: 0 0 1rem } figcaption { color: #57606a }
table { border-collapse: collapse } td, th { padding: .2rem 1rem .2rem 0; text-align: left }
pre { background: #f6f8fa; padding: 1rem; overflow-x: auto }
"""


def write_report(run: Location) -> Location:
    """Writes the page from what lies in the run folder, and returns where it is.

    Whatever others wrote there is shown as text: rows may be foreign, and lack anything.
    """
    rows = read_rows(run)
    sections = [
        "<h2>Last measurement</h2>" + _evaluations(rows),
        *_measured(rows),
        f'<h2>Curves</h2><div class="curves">{_curves(rows)}</div>',
        "<h2>The same samples over time</h2>"
        "<p>Each picture shows the stages' outputs side by side, coarse to final; each column is "
        "a class, each row a latent that stays the same through training.</p>"
        f'<div class="grids">{_grids(run)}</div>',
        f"<h2>What happened</h2>{_events(rows)}",
        f"<h2>Configuration</h2><pre>{_escaped(_text(run / CONFIG_NAME))}</pre>",
        f"<h2>Versions</h2>{_table(_versions(run).items())}",
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>cat-ray: {_escaped(run.name)}</title><style>{STYLE}</style>"
        f"<h1>{_escaped(run.name)}</h1><p>{_summary(rows)}</p>{''.join(sections)}</html>"
    )
    place = run / REPORT
    place.write(page.encode())
    return place


def _of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row.get("kind") == kind]


def _summary(rows: Sequence[Row]) -> str:
    train = _of_kind(rows, "train")
    if not train:
        return "Nothing was trained yet."
    last = train[-1]
    sessions = len({_number(row.get("session")) for row in rows})
    return _escaped(
        f"{_number(last.get('images'))} images ({_number(last.get('epoch'), '.1f')} epochs) on "
        f"{_number(last.get('workers'), '')} workers, "
        f"{_number(last.get('images_per_second'), '.0f')} images/s at the end, {sessions} "
        f"session{'s' if sessions > 1 else ''}, {_number(last.get('broken_samples'), '')} broken "
        "samples skipped."
    )


def _evaluations(rows: Sequence[Row]) -> str:
    measured = _of_kind(rows, "evaluation")
    if not measured:
        return "<p>Nothing was measured: evaluation.protocol is none.</p>"
    hidden = ("kind", "session")
    first, last = measured[0], measured[-1]
    lines = [
        (name.replace("_", " "), _number(first.get(name)), _number(last[name]))
        for name in last
        if name not in hidden
    ]
    return _table([("", "first", "last"), *lines])


def _measured(rows: Sequence[Row]) -> list[str]:
    """What was measured of checkpoints beside the training, with the best one."""
    found = _of_kind(rows, "measured")
    if not found:
        return []
    ranked = found[-1].get("best")
    best = ranked[:1] if isinstance(ranked, list) else []
    lines = []
    for row in found:
        metric, checkpoint = _number(row.get("metric")), row.get("checkpoint")
        others = [name for name in ("precision", "recall") if name in row]
        lines.append(
            (
                _number(row.get("images")),
                f"{metric} {_number(row.get(metric))}",
                *(f"{name} {_number(row[name])}" for name in others),
                _number(checkpoint),
                "the best" if checkpoint in best else "",
            )
        )
    return ["<h2>Checkpoints</h2>" + _table([("images",), *lines])]


def _events(rows: Sequence[Row]) -> str:
    events = _of_kind(rows, EVENT)
    return _table((_number(row.get("images")), _number(row.get("message"))) for row in events)


def _curves(rows: Sequence[Row]) -> str:
    figures = []
    for title, kind, prefixes in CURVES:
        chosen = _of_kind(rows, kind)
        names = [name for name in (chosen[-1] if chosen else {}) if name.startswith(prefixes)]
        curves = {name: points for name in names if (points := _points(chosen, name))}
        if not curves:
            continue
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.subplots()
        for name, points in list(curves.items())[:CURVES_SHOWN]:
            label = printable(name.replace("_", " "))[:LABEL_CHARACTERS]
            axes.plot(*zip(*points, strict=True), label=label, marker=".")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("images seen", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            for text in axes.legend(fontsize=8).get_texts():
                # A dollar in a name begins no formula.
                text.set_parse_math(False)
        figures.append(_image(plot.to_png(figure, 110), title))
    return "".join(figures)


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """Images and a figure, of the rows that have both as numbers that a picture can show."""
    pairs = [(row.get("images"), row.get(name)) for row in rows]
    return [
        (float(images), float(value))
        for images, value in pairs
        if all(_is_number(part) and not GREATEST < abs(part) < math.inf for part in (images, value))
    ]


def _grids(run: Location) -> str:
    names = sorted(name for name in (run / GRIDS).sizes() if GRID_NAME.fullmatch(name))
    # The first, the last, and some evenly between.
    last = len(names) - 1
    shown = sorted(
        {round(i * last / (GRIDS_SHOWN - 1)) for i in range(GRIDS_SHOWN)} if names else ()
    )
    figures = []
    for place in shown:
        name = names[place]
        images = int(name[len("images-") : -len(".png")])
        picture = _image((run / GRIDS / name).read(), f"samples after {images:,} images")
        figures.append(f"<figure>{picture}<figcaption>{images:,} images</figcaption></figure>")
    return "".join(figures)


def _image(content: bytes, description: str) -> str:
    encoded = base64.b64encode(content).decode()
    return f'<img alt="{_escaped(description)}" src="data:image/png;base64,{encoded}">'


def _text(place: Location) -> str:
    return place.read().decode(errors="replace") if place.exists() else ""


def _versions(run: Location) -> dict[str, str]:
    checkpoint = newest(run)
    try:
        return read_state(checkpoint).versions if checkpoint else {}
    except (NotFound, Damaged) as error:
        return {"not known": str(error)}


def _table(lines: Any) -> str:
    cells = ("".join(f"<td>{_escaped(cell)}</td>" for cell in line) for line in lines)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def _escaped(text: Any) -> str:
    """Text in the page: no markup, and none of the characters that HTML and UTF-8 haven't."""
    return html.escape(printable(str(text).replace("\r\n", "\n")))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any, form: str | None = None) -> str:
    """A figure as text; what is none as it is, lists and such in short."""
    if isinstance(value, str):
        return value
    if not _is_number(value):
        return "" if value is None else reprlib.repr(value)
    if isinstance(value, int) and abs(value) > GREATEST:
        # No float could hold it.
        return str(value)
    return format(value, (",.4g" if isinstance(value, float) else ",") if form is None else form)
