"""The plans of a job's runs: one, or one for each phase, and what each begins with."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.rule import Rule
from rich.table import Table

from cat_ray.checkpoint.transfer import Transfer
from cat_ray.config import Config
from cat_ray.operations.plan import Assumptions, Plan, make_plan
from cat_ray.operations.plan_report import plan_tables, plan_values
from cat_ray.schedule import phases
from cat_ray.training.beginning import rules
from cat_ray.training.phases import check_transitions


@dataclass(frozen=True)
class PlannedRun:
    """A run of a job, its plan, and by which rules it begins; None begins at random."""

    config: Config
    plan: Plan
    beginning: Transfer | None


def plan_job(config: Config, assumptions: Assumptions) -> tuple[PlannedRun, ...]:
    """Plans each run of a job.

    Raises:
        BadInput: a run can't go on from the weights that it is to begin with, or there are none.
    """
    runs = phases(config) or (config,)
    first = rules(runs[0]) if runs[0].run.initialise_from else None
    beginnings = (first, *check_transitions(runs))
    return tuple(
        PlannedRun(run, make_plan(run, assumptions), beginning)
        for run, beginning in zip(runs, beginnings, strict=True)
    )


def planned_tables(runs: Sequence[PlannedRun]) -> Iterator[RenderableType]:
    """The plans, to read at 100 columns."""
    for number, run in enumerate(runs, start=1):
        if len(runs) > 1:
            yield Rule(f"phase {number} of {len(runs)}")
        if run.beginning is not None:
            yield _beginning(run.beginning, run.config.run.initialise_from)
        yield from plan_tables(run.plan, run.config)


def planned_to_json(runs: Sequence[PlannedRun]) -> str:
    """One plan, or a list of them under `phases`, in bytes, MAC, seconds and dollars."""
    values = [
        plan_values(run.plan)
        | {"initialise_from": run.config.run.initialise_from, "rules": _listed(run.beginning)}
        for run in runs
    ]
    return json.dumps(values[0] if len(runs) == 1 else {"phases": values}, indent=2)


def _beginning(beginning: Transfer, uri: str | None) -> Table:
    title = f"begins with the weights of {uri}; optimisers and images seen begin anew"
    table = Table("of", "tensors", title=title, title_justify="left")
    table.add_column("", justify="right")
    table.add_column("rule")
    for group, names, count, told in beginning.told():
        table.add_row(group, names, str(count), told)
    return table


def _listed(beginning: Transfer | None) -> list[dict[str, object]] | None:
    if beginning is None:
        return None
    keys = ("of", "tensors", "count", "rule")
    return [dict(zip(keys, row, strict=True)) for row in beginning.told()]
