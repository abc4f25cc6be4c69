"""`report.html`: one self-contained page that shows how a run went."""

import base64
import html
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from cat_ray.checkpoint.read import newest, read_state
from cat_ray.evaluation import plot
from cat_ray.operations.identity import CONFIG_NAME
from cat_ray.operations.journal import EVENT, Row, read_rows
from cat_ray.storage import Location

REPORT = "report.html"
GRIDS = "grids"
GRID_NAME = re.compile(r"images-(\d+)\.png")
GRIDS_SHOWN = 6

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
    """Writes the page from what lies in the run folder, and returns where it is."""
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
        f"<h2>Configuration</h2><pre>{html.escape(_text(run / CONFIG_NAME))}</pre>",
        f"<h2>Versions</h2>{_table(_versions(run).items())}",
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>cat-ray: {html.escape(run.name)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(run.name)}</h1><p>{_summary(rows)}</p>{''.join(sections)}</html>"
    )
    place = run / REPORT
    place.write(page.encode())
    return place


def _summary(rows: Sequence[Row]) -> str:
    train = [row for row in rows if row["kind"] == "train"]
    if not train:
        return "Nothing was trained yet."
    last = train[-1]
    sessions = len({row["session"] for row in rows})
    return (
        f"{last['images']:,} images ({last['epoch']:.1f} epochs) on {last['workers']} workers, "
        f"{last['images_per_second']:.0f} images/s at the end, {sessions} "
        f"session{'s' if sessions > 1 else ''}, {last['broken_samples']} broken samples skipped."
    )


def _evaluations(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row["kind"] == "evaluation"]
    if not measured:
        return "<p>Nothing was measured: evaluation.protocol is none.</p>"
    hidden = ("kind", "session")
    first, last = measured[0], measured[-1]
    lines = [
        (name.replace("_", " "), _number(first[name]), _number(last[name]))
        for name in last
        if name not in hidden
    ]
    return _table([("", "first", "last"), *lines])


def _measured(rows: Sequence[Row]) -> list[str]:
    """What was measured of checkpoints beside the training, with the best one."""
    found = [row for row in rows if row["kind"] == "measured"]
    if not found:
        return []
    best = found[-1]["best"][:1]
    lines = [
        (
            f"{row['images']:,}",
            f"{row['metric']} {_number(row[row['metric']])}",
            *(f"{name} {_number(row[name])}" for name in ("precision", "recall") if name in row),
            row["checkpoint"],
            "the best" if row["checkpoint"] in best else "",
        )
        for row in found
    ]
    return ["<h2>Checkpoints</h2>" + _table([("images",), *lines])]


def _events(rows: Sequence[Row]) -> str:
    return _table((f"{row['images']:,}", row["message"]) for row in rows if row["kind"] == EVENT)


def _curves(rows: Sequence[Row]) -> str:
    figures = []
    for title, kind, prefixes in CURVES:
        chosen = [row for row in rows if row["kind"] == kind]
        names = [name for name in (chosen[-1] if chosen else {}) if name.startswith(prefixes)]
        if not names:
            continue
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.subplots()
        for name in names:
            points = [(row["images"], row[name]) for row in chosen if name in row]
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), marker=".")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("images seen", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=8)
        figures.append(_image(plot.to_png(figure, 110), title))
    return "".join(figures)


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
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{encoded}">'


def _text(place: Location) -> str:
    return place.read().decode() if place.exists() else ""


def _versions(run: Location) -> dict[str, str]:
    checkpoint = newest(run)
    return read_state(checkpoint).versions if checkpoint else {}


def _table(lines: Any) -> str:
    cells = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in line) for line in lines)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def _number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
