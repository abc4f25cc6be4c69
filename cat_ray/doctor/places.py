"""Which places in storage are probed, and probing them from all nodes at once."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from ray.actor import ActorHandle

from cat_ray.config import Config
from cat_ray.data.index import INDEX_NAME
from cat_ray.doctor.asking import gather
from cat_ray.doctor.facts import Node, Place, Trial
from cat_ray.doctor.storage_probe import cleared, take_away
from cat_ray.errors import ExpectedError
from cat_ray.section import Storage
from cat_ray.storage import Location


@dataclass(frozen=True)
class Asked:
    """A place in storage that is to be probed, as it is sent to the nodes."""

    key: str
    uri: str
    storage: Storage
    written: bool

    def location(self) -> Location:
        """The place."""
        return self.storage.locate(self.uri)


def places_of(config: Config | None, uri: str | None, endpoint_url: str | None) -> list[Asked]:
    """What to probe; each is known to be a URI."""
    asked = []
    # A diagnosis says how the storage is now.
    at_once = {"retry_seconds": 0.0}
    storage = (config.storage if config else Storage()).model_copy(update=at_once)
    if config is not None:
        shards = storage.locate(config.data.shards)
        run = storage.locate(config.run.folder)
        asked.append(Asked("run.folder", run.uri, storage, written=True))
        made = config.data.source is not None and not _has_index(shards)
        asked.append(Asked("data.shards", shards.uri, storage, written=made))
    if uri is not None:
        storage = storage.model_copy(update={"endpoint_url": endpoint_url or storage.endpoint_url})
        place = storage.locate(uri)
        asked.append(Asked("--storage", place.uri, storage, written=True))
    return asked


def _has_index(shards: Location) -> bool:
    try:
        return (shards / INDEX_NAME).exists()
    except ExpectedError:
        # Then it can't be read either, and the trials will say so.
        return True


def probe(
    asked: Asked,
    examiners: Mapping[str, ActorHandle],
    nodes: Mapping[str, Node],
) -> Place:
    """Probes a place from all nodes at once."""
    folder, name = asked.location(), f".cat-ray-doctor-{uuid.uuid4().hex[:12]}"
    left_behind: list[str] = []
    probes = {key: f"{name}-{number}" for number, key in enumerate(examiners)}
    trials: list[Trial] = []

    def tried() -> None:
        answers, reasons = gather(
            {key: each.trial.remote(asked, probes[key], name) for key, each in examiners.items()}
        )
        trials.extend(answers.values())
        late = [Trial(nodes[key].name, refused="list", reason=why) for key, why in reasons.items()]
        trials.extend(late)

    if not asked.written:
        tried()
    else:
        with cleared(folder, left_behind):
            try:
                (folder / name).write(b"cat-ray doctor")
            except ExpectedError as error:
                driver = next(iter(nodes.values())).name if nodes else "the driver"
                trials.append(Trial(driver, refused="write", reason=str(error)))
            else:
                tried()
            written = [folder / each for each in (name, *probes.values())]
            left_behind += [each.uri for each in written if not take_away(each)]
    local = folder.local_path is not None
    return Place(asked.key, asked.uri, asked.written, local, tuple(trials), tuple(left_behind))
