"""What is wrong with the storage that a job uses. Pure."""

from collections.abc import Sequence

from cat_ray.doctor.facts import Place
from cat_ray.doctor.finding import Finding
from cat_ray.doctor.wording import counted, in_rate, in_time, listed

# How curl, which Arrow's clients speak through, says that there was no answer.
UNREACHED = ("Failed to connect", "Could not connect", "Could not resolve host")


def storage(places: Sequence[Place]) -> tuple[Finding, ...]:
    """Whether the job's storage does what the job needs, a finding for each place."""
    if not places:
        advice = "name a job, or a place by --storage"
        return (Finding("storage", "warn", "not tried: there is no job", advice),)
    return tuple(_at(place) for place in places)


def _at(place: Place) -> Finding:
    check = f"storage: {place.key}"
    refused = [trial for trial in place.trials if trial.refused]
    if refused:
        first = refused[0]
        nodes = listed([trial.node for trial in refused])
        found = f"{place.uri}: {first.refused} failed on {nodes}: {first.reason}"
        return Finding(check, "fail", found, _storage_advice(place, first.refused, first.reason))
    if place.left_behind:
        found = f"{place.uri} works, but {', '.join(place.left_behind)} can't be taken away"
        return Finding(check, "warn", found, "delete it, and allow deletion there")
    rates = [
        f"{label} {in_rate(values)}"
        for label, values in (
            ("write", [trial.write_rate for trial in place.trials]),
            ("read", [trial.read_rate for trial in place.trials]),
        )
        if any(values)
    ]
    listing = max((trial.list_seconds or 0.0 for trial in place.trials), default=0.0)
    nodes = counted(len(place.trials), "node")
    found = f"{place.uri}: {', '.join([*rates, f'list {in_time(listing)}'])}, from {nodes} at once"
    return Finding(check, "pass", found)


def _storage_advice(place: Place, step: str, reason: str) -> str:
    if any(words in reason for words in UNREACHED):
        return "nobody was reached there: check the URI and storage.endpoint_url (--endpoint-url)"
    if step == "see":
        return "use an object store, or a disk that all nodes mount at this path"
    if step in ("write", "delete") and place.local:
        return f"make it writable and not full, or choose another {place.key}"
    if step in ("write", "delete"):
        return (
            f"the bucket is read-only for these credentials: allow to put and delete objects, or "
            f"choose another {place.key}"
        )
    if place.key == "data.shards":
        return "run `cat-ray prepare` or `cat-ray index`, or put data.shards right"
    return "check the URI, storage.endpoint_url, and the credentials on each node"
