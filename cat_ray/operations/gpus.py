"""What GPU types can do and cost: the table `gpus.yaml`."""

import datetime
from functools import cache
from importlib.resources import files

import yaml
from pydantic import Field

from cat_ray.errors import BadInput
from cat_ray.section import Section

TABLE = "gpus.yaml"


class Gpu(Section):
    """A GPU type; prices are indicative list prices of the source at the date, in dollars.

    `peak_teraflops` is for dense bf16, a multiplication and an addition being two operations.
    """

    name: str
    memory_gigabytes: float = Field(gt=0)
    peak_teraflops: float = Field(gt=0)
    on_demand_per_gpu_hour: float | None = Field(ge=0)
    spot_per_gpu_hour: float | None = Field(ge=0)
    source: str
    date: datetime.date


@cache
def known_gpus() -> dict[str, Gpu]:
    """The table, by name."""
    table = yaml.safe_load((files(__package__) / TABLE).read_text())
    return {name: Gpu(name=name, **row) for name, row in table.items()}


def find_gpu(name: str) -> Gpu:
    """A row of the table, however its name is capitalised.

    Raises:
        BadInput: there is none of this name.
    """
    table = known_gpus()
    for known, gpu in table.items():
        if known.lower() == name.lower():
            return gpu
    raise BadInput(f"--gpu {name}: known are cpu, {', '.join(table)}")
