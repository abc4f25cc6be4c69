"""What `cat-ray fid` leaves: the figures, what they are called, and what they depend on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from rich.table import Table

from cat_ray.errors import BadInput
from cat_ray.storage import Location

FRECHET = "frechet"
METRICS = {"inception": "fid", "dinov2": "fd_dinov2_", "pixels": "pixels"}


@dataclass(frozen=True)
class Result:
    """What was measured, of what, and how.

    Attributes:
        metric: the name of the distance; another protocol has another name.
        figures: the distance and what else was measured, by name.
        protocol: what must be the same for two distances to be comparable.
        subject: whose samples they are.
        pixels_sha256: of the samples: equal sets have equal ones.
        made_with: versions and device.
        images_per_second: of this call, while the processes worked.
        seconds: that its parts took: the processes' start, the samples, the figures.
    """

    metric: str
    figures: Mapping[str, float]
    protocol: Mapping[str, Any]
    subject: Mapping[str, Any]
    pixels_sha256: str
    made_with: Mapping[str, str]
    images_per_second: Mapping[str, float]
    seconds: Mapping[str, float]


_RESULT = TypeAdapter(Result)


def metric_name(network: str, reference: str, count: int) -> str:
    """What a Frechet distance is called: never FID-50K what isn't on 50,000 samples.

    Args:
        network: of the features; only on Inception's it is an FID.
        reference: `adm`, a published file, or `shards`.
        count: samples.
    """
    short = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    return f"{METRICS[network]}{short}_{reference}"


def result_table(result: Result) -> Table:
    """The figures, for people."""
    table = Table(title=f"{result.metric}: {result.subject['images']:,} images seen")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in result.figures.items():
        table.add_row(result.metric if name == FRECHET else name, f"{value:.6g}")
    for name, rate in result.images_per_second.items():
        what = "images/s, all processes" if name == "all" else f"images/s of a process, {name}"
        table.add_row(what, f"{rate:,.0f}")
    for part, seconds in result.seconds.items():
        table.add_row(f"seconds, {part}", f"{seconds:,.1f}")
    return table


def differences(a: Result, b: Result) -> Iterator[str]:
    """Why two results' distances are not comparable, a line for each reason; none if they are."""
    if a.metric != b.metric:
        yield f"metric: {a.metric}, {b.metric}"
    for name in sorted({*a.protocol, *b.protocol}):
        one, other = a.protocol.get(name), b.protocol.get(name)
        if one != other:
            yield f"{name}: {one}, {other}"


def read_result(place: Location) -> Result:
    """What a result file holds.

    Raises:
        BadInput: it is none.
    """
    try:
        return _RESULT.validate_json(place.read())
    except ValueError as error:
        raise BadInput(f"{place.uri} is no result of `cat-ray fid`") from error
