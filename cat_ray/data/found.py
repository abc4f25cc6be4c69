"""What a source holds and what of it will not be read, for a look before the work."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cat_ray.data.names import counted, named, one_line
from cat_ray.data.preparation import Preparation
from cat_ray.data.sources import Source, Unit, guess_kind, list_units


@dataclass(frozen=True)
class Found:
    """What a job's source holds.

    Attributes:
        source: where samples come from.
        units: in which they lie.
        classes: the names of classes, where they have any.
        left_out: what can't be used, counted by file ending or reason.
    """

    source: Source
    units: Sequence[Unit]
    classes: Sequence[str]
    left_out: Mapping[str, int]

    def describe(self) -> str:
        """What will be read and what will not, for a person."""
        count, kind = sum(unit.count for unit in self.units), self.source.kind
        lines = [f"found {count:,} samples in {self.source.place.uri} ({kind})"]
        if len(self.classes) > 1:
            last = len(self.classes) - 1
            first, final = one_line(self.classes[0]), one_line(self.classes[last])
            lines[0] += f", class 0 is {first}, class {last} is {final}"
        elif self.classes:
            lines[0] += (
                f", all of one class, {one_line(self.classes[0])}, for unconditional training"
            )
        if self.left_out:
            lines.append(f"left out: {counted(self.left_out)}")
        if all(map(str.isdecimal, self.classes)):
            other = [f"{name} is {n}" for n, name in enumerate(self.classes) if int(name) != n]
            if other:
                lines.append(f"classes are in the order of their names as text: {named(other)}")
        return "\n".join(lines)


def look(job: Preparation) -> Found:
    """Looks at what a job's source holds; writes nothing.

    Raises:
        BadInput: the source can't be read, or it is unclear of which class its samples are.
    """
    source, left_out = _source(job), Counter[str]()
    units, classes = list_units(source, left_out)
    return Found(source, units, classes, left_out)


def _source(job: Preparation) -> Source:
    asked, storage = job.source, job.storage
    place = storage.locate(asked.uri or ".")
    pattern = asked.pattern or ""
    kind = guess_kind(place, pattern) if asked.kind == "auto" else asked.kind
    return Source(kind, place, asked.image_column, asked.label_column, asked.crops, pattern)
