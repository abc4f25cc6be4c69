"""A job in phases, as of growing resolution: each is a run that begins as the one before ended.

    run.folder/phase-1, phase-2, ...   the phases' runs, each as any other run's folder
    run.folder/outcome.json            how the last call of the whole job ended

The base's values hold for every phase but for what its `set` changes. A phase's seed is the job's
plus the number of phases before it, so that no phase draws what another drew.
"""

import yaml

from cat_ray.config import Config, parse, set_value
from cat_ray.errors import BadInput
from cat_ray.storage import Location

PHASE = "phase-"
# Of all phases, or what follows from their order.
NOT_SET = ("run", "storage", "schedule")


def phases(config: Config, name: str = "the job", as_written: bool = False) -> tuple[Config, ...]:
    """The runs that a job's schedule consists of.

    Args:
        config: the job.
        name: is used in messages.
        as_written: see `parse`.

    Raises:
        BadInput: a phase is no valid job.
    """
    numbers = range(1, len(config.schedule) + 1)
    return tuple(_phase(config, number, name, as_written) for number in numbers)


def phase_folder(folder: str, number: int) -> str:
    """The folder of a phase's run, the first one's number being 1."""
    return f"{folder.rstrip('/')}/{PHASE}{number}"


def check_has_no_phases(place: Location) -> None:
    """For whoever needs the folder of one run.

    Raises:
        BadInput: it is that of a job with phases, which are named.
    """
    found = [folder.uri for folder in place.folders() if folder.name.startswith(PHASE)]
    if found:
        raise BadInput(f"{place.uri} was trained in phases, name one: {', '.join(found)}")


def check_has_no_schedule(config: Config, what: str) -> None:
    """For whoever needs a job of one run.

    Raises:
        BadInput: the job has a schedule.
    """
    if config.schedule:
        raise BadInput(f"{what} takes a job without phases: leave out its schedule")


def _phase(config: Config, number: int, name: str, as_written: bool) -> Config:
    phase, told = config.schedule[number - 1], f"{name}, phase {number} of schedule"
    values = config.model_dump(mode="json", exclude={"schedule"})
    for dotted, value in phase.set.items():
        if dotted.split(".")[0] in NOT_SET:
            raise BadInput(f"{told}: {dotted} can't be set for one phase")
        set_value(values, dotted, value, f"{told}: {dotted}")
    folder = config.run.folder
    values["run"] |= {
        "folder": phase_folder(folder, number),
        "total_images": phase.images,
        "seed": config.run.seed + number - 1,
    }
    if number > 1:
        values["run"]["initialise_from"] = phase_folder(folder, number - 1)
    return parse(yaml.safe_dump(values), told, as_written=as_written)
