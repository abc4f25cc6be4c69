"""`cat-ray fid --truncation`: a checkpoint's distance over the truncation, on the same latents."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table

from cat_ray.connection import connected
from cat_ray.evaluation import plot
from cat_ray.evaluation.fid import fid
from cat_ray.evaluation.measurement import Measurement
from cat_ray.evaluation.outputs import SHEET
from cat_ray.evaluation.result import FRECHET, Result
from cat_ray.evaluation.sample_plan import checkpoint_of, folder_of
from cat_ray.storage import Location

SAMPLES_SHOWN = 10
PLOTS = {
    "precision and recall": ("precision", "recall"),
    "distance of each stage to the final output": ("discrepancy_",),
    "rewrite from stage to stage": ("rewrite_",),
}


def sweep(jobs: Sequence[Measurement]) -> tuple[list[Result], Location]:
    """Measures jobs that differ in `samples.truncation` only, each once, from the least.

    Returns:
        The results, and a file that holds them all; a plot of them lies beside it.

    Raises:
        BadInput: as `fid`.
    """
    by_truncation = {job.samples.truncation: job for job in jobs}
    first, workers = jobs[0], jobs[0].workers
    # Once: of a run that is being trained the newest checkpoint becomes another one meanwhile.
    checkpoint = checkpoint_of(first)
    results, sheets = [], []
    with connected(workers.count * workers.cpus_per_worker, {}):
        for _, job in sorted(by_truncation.items()):
            samples = job.samples.model_copy(update={"checkpoint": checkpoint.uri})
            result, place = fid(job.model_copy(update={"samples": samples}))
            results.append(result)
            sheets.append(place.name.removesuffix(".json") + SHEET)
    digest = hashlib.sha256("".join(sheets).encode()).hexdigest()[:8]
    folder = folder_of(first)
    stem = f"truncation-{results[0].metric}-{checkpoint.name}-{digest}"
    rows = []
    for sheet in sheets:
        with (folder / sheet).opened() as file:
            rows.append(np.asarray(Image.open(file, formats=["PNG"])))
    (folder / f"{stem}.png").write(_plot(results, rows))
    place = folder / f"{stem}.json"
    place.write(json.dumps([asdict(result) for result in results], indent=1).encode())
    return results, place


def sweep_table(results: Sequence[Result]) -> Table:
    """All figures over the truncation, for people; the least distance is marked."""
    best = min(result.figures[FRECHET] for result in results)
    table = Table(
        title=f"{results[0].metric}: {results[0].subject['images']:,} images seen",
        caption="* the least distance",
    )
    table.add_column("truncation")
    for result in results:
        mark = " *" if result.figures[FRECHET] == best else ""
        table.add_column(f"{result.protocol['truncation']:g}{mark}", justify="right")
    for name in results[0].figures:
        values = [f"{result.figures[name]:.6g}" for result in results]
        table.add_row(results[0].metric if name == FRECHET else name, *values)
    return table


def _plot(results: Sequence[Result], sheets: Sequence[np.ndarray]) -> bytes:
    """Curves, and below them the first samples of each truncation, a row for each."""
    side = results[0].protocol["side"]
    curves = dict(_curves(results))
    figure = Figure(figsize=(5 * len(curves), 4 + 0.5 * len(sheets)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[4, 0.5 * len(sheets)])
    at = [result.protocol["truncation"] for result in results]
    for axes, (title, names) in zip(upper.subplots(1, len(curves)), curves.items(), strict=True):
        for name in names:
            axes.plot(at, [result.figures[name] for result in results], marker=".", label=name)
        axes.set_title(title)
        axes.set_xlabel("truncation")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    rows = np.concatenate([sheet[:side, : SAMPLES_SHOWN * side] for sheet in sheets])
    axes = lower.subplots()
    axes.imshow(rows, cmap="gray", vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([(row + 0.5) * side for row in range(len(at))], [f"{value:g}" for value in at])
    axes.set_ylabel("truncation")
    return plot.to_png(figure)


def _curves(results: Sequence[Result]) -> Iterator[tuple[str, list[str]]]:
    yield results[0].metric, [FRECHET]
    for title, prefixes in PLOTS.items():
        if names := [name for name in results[0].figures if name.startswith(prefixes)]:
            yield title, names
