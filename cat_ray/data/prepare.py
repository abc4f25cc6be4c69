"""Makes shards and their index from what people have, as a Ray Data job that can be interrupted.

What goes into each shard is planned before anything is written. A shard is one task; a record
beside it, written last, says that it is done. The same command does what an interruption left.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import ray

from cat_ray.connection import check_connection, connected
from cat_ray.data.contact import SHOWN, contact_sheet, histogram
from cat_ray.data.encoder import Encoder, Encodings
from cat_ray.data.found import Found, look
from cat_ray.data.index import INDEX_NAME, Index, Shard, dense, read_index, write_index
from cat_ray.data.latent_shape import CHANNELS, REDUCTION
from cat_ray.data.latents import load_vae
from cat_ray.data.preparation import CARRIED, Output, Preparation
from cat_ray.data.preparation import Source as SourceSection
from cat_ray.data.shard_file import Written, write_shard_file
from cat_ray.data.shard_plan import ShardPlan, plan_shards
from cat_ray.data.shard_task import Encode, image_entries, latent_entries, read_plan
from cat_ray.data.sources import Source
from cat_ray.data.tasks import run_tasks
from cat_ray.data.writable import check_writable
from cat_ray.errors import BadInput, Damaged
from cat_ray.folder_lock import is_lock, locked
from cat_ray.json_text import parse_json
from cat_ray.objective.alignment import load_teacher
from cat_ray.operations.counting import Counting
from cat_ray.section import Storage
from cat_ray.storage import Location

RECORDS = "records"
JOB_NAME, BROKEN_NAME = "preparation.json", "broken.json"
# Shown to people: what the classes hold, and what the pictures look like.
HISTOGRAM_NAME, CONTACT_NAME = "classes.png", "contact.png"
T = TypeVar("T")


def prepare(job: Preparation, tell: Callable[[str], None] = lambda _: None) -> Index:
    """Writes the shards of a source that are not there yet, and then the index.

    Args:
        job: what to read and to write.
        tell: gets what was found and what is left out, before the work.

    Raises:
        BadInput: the source can't be read, or the folder holds something else.
    """
    folder = job.storage.locate(job.output.folder)
    if (folder / INDEX_NAME).exists():
        if not (folder / JOB_NAME).exists():
            raise BadInput(
                f"{folder.uri} holds shards of something else: choose another output.folder"
            )
    else:
        # Looking at the source may take an hour.
        check_writable(folder, "choose another output.folder")
        if job.source.kind != "mnist":
            check_connection()
    found = look(job)
    own = _identity(job, found)
    claimed = _is_claimed(folder, own)
    if found.source.kind not in CARRIED:
        tell(found.describe())
    if claimed and (folder / INDEX_NAME).exists() and not (folder / RECORDS).sizes():
        return read_index(folder)
    with locked(folder, "cat-ray prepare"):
        if not _is_claimed(folder, own):
            (folder / JOB_NAME).write(json.dumps(own, indent=1).encode())
        return _prepare(job, folder, found)


def _prepare(job: Preparation, folder: Location, found: Found) -> Index:
    output, source, units = job.output, found.source, found.units
    plans = list(plan_shards(units, output.shard_images, output.seed))
    if (folder / INDEX_NAME).exists():
        # A kill came before the records were removed.
        _remove_records(folder, plans)
        return read_index(folder)
    made_with = _made_with(job)
    done = {name.removesuffix(".json") for name in (folder / RECORDS).sizes()}
    left = [plan for plan in plans if plan.name not in done]
    if source.kind == "mnist":
        # Quicker than Ray can start.
        for plan in left:
            _write_one(job, source, folder, plan, None)
    elif left:
        _write(job, source, folder, left, len(plans))
    return _finish(job, source, folder, plans, made_with)


def left_out(job: Preparation) -> int:
    """How many samples of a finished preparation couldn't be used."""
    folder = job.storage.locate(job.output.folder)
    return len(_read_json(folder / BROKEN_NAME, list))


def digits(folder: str, storage: Storage) -> Preparation:
    """The job that makes the quickstart's shards."""
    return Preparation(
        source=SourceSection(kind="mnist"),
        output=Output(folder=folder, resolution=32, channels=1, shard_images=500),
        storage=storage,
    )


def _identity(job: Preparation, found: Found) -> dict[str, Any]:
    """What makes a job another one: its settings, its samples and their classes."""
    units = json.dumps([asdict(unit) for unit in found.units])
    settings = job.model_dump(mode="json", exclude={"storage", "workers"})
    settings["source"] |= {"kind": found.source.kind, "uri": found.source.place.uri}
    if job.source.pattern is None:
        # As before there were patterns.
        del settings["source"]["pattern"]
    del settings["output"]["folder"]
    samples = hashlib.sha256(units.encode()).hexdigest()
    return {"samples": samples, "classes": list(found.classes), **settings}


def _is_claimed(folder: Location, own: Mapping[str, Any]) -> bool:
    """Whether a folder is this job's already; if not, it is free.

    Raises:
        BadInput: it is another job's, or holds something else.
    """
    names = {name for name in folder.sizes() if not is_lock(name)}
    place = folder / JOB_NAME
    if place.exists():
        changed = list(_changes(_read_json(place, dict), own))
        # Of a job that failed before it had written anything another may take the place.
        if changed and (names != {JOB_NAME} or folder.folders()):
            raise BadInput(
                f"{folder.uri} was begun with another job ({'; '.join(changed)}): restore that, or "
                "choose another output.folder"
            )
        return not changed
    if names or folder.folders():
        raise BadInput(f"{folder.uri} isn't empty: choose another output.folder")
    return False


def _read_json(place: Location, kind: type[T]) -> T:
    """What an earlier call wrote: an object or a list.

    Raises:
        Damaged: it is none any more.
    """
    try:
        found = parse_json(place.read())
    except ValueError:
        found = None
    if not isinstance(found, kind):
        raise Damaged(
            f"{place.uri} is damaged: restore it, or choose another output.folder to begin anew"
        )
    return found


def _changes(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """What differs between two jobs, key by key."""
    for name in after:
        old, new = before.get(name), after[name]
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{prefix}{name}.")
        elif old != new:
            # The samples are a hash, the classes may be a thousand.
            short = prefix and f": {old} -> {new}"
            yield f"{prefix}{name}{short}"


def _write(
    job: Preparation, source: Source, folder: Location, left: Sequence[ShardPlan], total: int
) -> None:
    """Lets Ray Data write shards, as many at a time as the cluster has room for."""
    latents, workers = job.output.contents == "latents", job.workers
    needed = workers.cpus_per_task + (workers.encoders if latents else 0)
    with connected(needed, {}), Counting("shards", total, done=total - len(left)) as counting:
        encoders = _start_encoders(job) if latents else []
        settings = {"job": job, "source": source, "folder": folder, "encoders": encoders}
        rows = [{"plan": plan} for plan in left]
        for row in run_tasks(_task, rows, workers.cpus_per_task, **settings):
            counting.add(f"{row['name']}: {row['count']:,} images")


def _start_encoders(job: Preparation) -> list[Any]:
    actor = ray.remote(
        num_cpus=1, num_gpus=int(job.workers.gpu), max_restarts=-1, max_task_retries=-1
    )(Encoder)
    return [actor.remote(job) for _ in range(job.workers.encoders)]


def _task(
    row: dict[str, Any], job: Preparation, source: Source, folder: Location, encoders: list[Any]
) -> dict[str, Any]:
    turns = itertools.cycle(encoders)

    def encode(pixels: np.ndarray) -> Callable[[], Encodings]:
        waiting = next(turns).encode.remote(pixels)
        return lambda: ray.get(waiting)

    record = _write_one(job, source, folder, row["plan"], encode)
    return {"name": record.shard.name, "count": record.shard.count}


def _write_one(
    job: Preparation, source: Source, folder: Location, plan: ShardPlan, encode: Encode | None
) -> Written:
    """Writes one shard, and then its record."""
    broken: list[str] = []
    samples = read_plan(source, plan)
    if encode is not None and job.output.contents == "latents":
        first = plan.name.removesuffix(".tar")
        entries = latent_entries(samples, job.output, broken.append, encode, first)
    else:
        entries = image_entries(samples, job.output, broken.append)
    written = write_shard_file(folder, plan.name, entries)
    record = {**asdict(written), "broken": broken}
    (folder / RECORDS / f"{plan.name}.json").write(json.dumps(record).encode())
    return written


def _made_with(job: Preparation) -> dict[str, Any]:
    """What the index tells of latents; networks that can't be loaded are found before the work."""
    if job.output.contents != "latents":
        return {}
    codec = load_vae(job.latents.vae or "", job.latents.revision)
    if job.output.tokens:
        load_teacher(job.teacher.name, job.teacher.width)
    return {
        "vae": job.latents.vae,
        "revision": job.latents.revision,
        "scaling_factor": codec.scaling_factor,
        "image_resolution": job.output.resolution,
        **({"tokens": job.teacher.model_dump()} if job.output.tokens else {}),
    }


def _finish(
    job: Preparation,
    source: Source,
    folder: Location,
    plans: Sequence[ShardPlan],
    made_with: dict[str, Any],
) -> Index:
    """Puts all records together to the index, draws what people look at, removes the records."""
    output = job.output
    records = [_read_json(folder / RECORDS / f"{plan.name}.json", dict) for plan in plans]
    shards = [Shard(**record["shard"]) for record in records]
    counts = Counter[int]()
    for record in records:
        counts.update({int(label): n for label, n in record["class_counts"].items()})
    if not counts:
        raise BadInput(f"no sample of {source.place.uri} can be used: {records[0]['broken'][:3]}")
    broken = [line for record in records for line in record["broken"]]
    (folder / BROKEN_NAME).write(json.dumps(broken, indent=1).encode())
    latents = output.contents == "latents"
    class_counts = dense(counts)
    (folder / HISTOGRAM_NAME).write(histogram(class_counts))
    (folder / CONTACT_NAME).write(contact_sheet(islice(read_plan(source, plans[0]), SHOWN), output))
    if latents:
        resolution = output.resolution // REDUCTION
    else:
        resolution = None if output.encoding == "original" else output.resolution
    index = write_index(
        folder,
        Index(
            contents=output.contents,
            resolution=resolution,
            channels=CHANNELS if latents else output.channels,
            class_counts=class_counts,
            source=CARRIED.get(source.kind, f"{source.kind} {source.place.uri}"),
            # The last shard may have lost all it had.
            shards=tuple(shard for shard in shards if shard.count),
            extents_sha256="",
            pack_images=output.pack_images if latents else 1,
            made_with=made_with,
        ),
        {record["shard"]["name"]: record["extents"] for record in records},
    )
    _remove_records(folder, plans)
    return index


def _remove_records(folder: Location, plans: Sequence[ShardPlan]) -> None:
    names = {f"{plan.name}.json" for plan in plans}
    # A kill leaves a partial one.
    (folder / RECORDS).delete_files((names | {f".{name}.partial" for name in names}).__contains__)
