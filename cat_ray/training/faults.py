"""Faults put into a run on purpose, at given numbers of images: for drills, never by chance."""

import json
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import ray

from cat_ray.checkpoint.read import newest
from cat_ray.checkpoint.write import CheckpointWriter
from cat_ray.errors import BadInput
from cat_ray.storage import Location

FAULTS = "faults"
REFUSED_WRITES = 3

Kind = Literal["raise", "kill", "stop", "refuse", "truncate", "drain", "remove", "add"]
# What a worker does to itself; the others are done to its node, by the drill.
BY_WORKER = ("raise", "kill", "stop", "refuse", "truncate")
ENTRY = re.compile(r"\s*(?P<kind>[a-z]+)@(?P<images>\d+(?:_\d+)*)(?::(?P<rank>\d+))?\s*")


@dataclass(frozen=True)
class Fault:
    """What befalls a worker, or its node, after the first step that reaches so many images."""

    kind: Kind
    images: int
    rank: int = 0


class Injected(RuntimeError):
    """The exception of the fault `raise`."""


def parse_schedule(text: str) -> tuple[Fault, ...]:
    """Faults from `kind@images[:rank]`, separated by commas.

    Raises:
        BadInput: an entry reads otherwise, or its kind doesn't exist.
    """
    faults = []
    for entry in text.split(","):
        match = ENTRY.fullmatch(entry)
        if match is None or match["kind"] not in get_args(Kind):
            raise BadInput(
                f"--schedule {entry.strip()}: write kind@images or kind@images:rank, where kind is "
                f"one of {', '.join(get_args(Kind))}"
            )
        kind: Kind = match["kind"]  # pyright: ignore[reportAssignmentType]
        faults.append(Fault(kind, int(match["images"]), int(match["rank"] or 0)))
    return tuple(sorted(faults, key=lambda fault: fault.images))


def strike_of(run: Location, place: int) -> dict[str, Any] | None:
    """When and where the fault at this place of the schedule came, or None if it has not yet."""
    record = run / FAULTS / f"{place:03d}.json"
    return json.loads(record.read()) if record.exists() else None


class Injector:
    """Lets each fault of one worker come once, however often the run starts again."""

    def __init__(self, run: Location, faults: Sequence[Fault], rank: int):
        self._run = run
        self._own = [(place, fault) for place, fault in enumerate(faults) if fault.rank == rank]
        self._own = [(place, f) for place, f in self._own if strike_of(run, place) is None]

    def strike(self, images: int, writer: CheckpointWriter) -> None:
        """Lets come what is due after a step, in order."""
        while self._own and self._own[0][1].images <= images:
            place, fault = self._own.pop(0)
            record = {
                **asdict(fault),
                "images": images,
                "at": time.time(),
                "node": ray.get_runtime_context().get_node_id(),
            }
            (self._run / FAULTS / f"{place:03d}.json").write(json.dumps(record).encode())
            self._befall(fault, writer)

    def _befall(self, fault: Fault, writer: CheckpointWriter) -> None:
        if fault.kind == "raise":
            raise Injected(f"a fault of the drill at {fault.images:,} images")
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault.kind == "refuse":
            writer.refuse(REFUSED_WRITES)
        if fault.kind == "truncate":
            writer.wait()
            checkpoint = newest(self._run)
            if checkpoint is not None:
                sizes = checkpoint.sizes()
                largest = checkpoint / max(sizes, key=lambda name: sizes[name])
                content = largest.read()
                largest.write(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
