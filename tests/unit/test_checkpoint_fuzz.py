"""Whatever a checkpoint's files say, they are read as written, or refused in our own words."""

import copy
import hashlib
import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cat_ray.checkpoint import contents as contents_of_files
from cat_ray.checkpoint.commit import commit_abandoned
from cat_ray.checkpoint.layout import (
    DAMAGED,
    FOLDER,
    GENERATOR,
    GENERATOR_MOMENTS,
    MANIFEST,
    STATE,
    State,
    folder_name,
    part_file,
    read_whole,
    slice_file,
)
from cat_ray.checkpoint.read import CheckpointReader, newest, newest_sound, resolve, verify
from cat_ray.checkpoint.retain import (
    BEST,
    LEASE_SECONDS,
    LONGEST_LEASE_SECONDS,
    drop_old,
    leased,
    read_best,
    write_best,
)
from cat_ray.checkpoint.write import CheckpointWriter, Slice
from cat_ray.errors import ExpectedError
from cat_ray.storage import Location, locate
from cat_ray.training.health import ROLL_BACKS, RollBack, add_roll_back, read_roll_backs

GROUP = "3f9a1c"
GROUPS = (GENERATOR, GENERATOR_MOMENTS)
WORKERS = 2
PREVIOUS, LAST = 32, 64
GIGABYTE_KIB = 1 << 20
# Against hanging only: machines are slow at times.
DEADLINE = timedelta(seconds=20)
counts = pytest.mark.parametrize(
    "count", [150, pytest.param(10_000, marks=pytest.mark.long)], ids=["short", "long"]
)


def state(images: int) -> State:
    return State(images, 3, "digest", "seed: 1", {"python": "3.11", "torch": "2"})


def values(images: int) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(images)
    shapes = {"weight": (4, 6), "bias": (10,), "scale": ()}
    return {name: torch.randn(shape, generator=numbers) for name, shape in shapes.items()}


class Saved:
    """A run with two checkpoints, the files of which are changed and put back."""

    def __init__(self, folder: Path):
        self.run = locate(str(folder))
        for images in (PREVIOUS, LAST):
            self._save(images)
        self.previous, self.last = (
            self.run / FOLDER / folder_name(images, GROUP) for images in (PREVIOUS, LAST)
        )
        self.files = {name: (self.last / name).read() for name in self.last.sizes()}

    def restore(self) -> None:
        """Everything as it was saved."""
        for name in self.last.sizes():
            if name not in self.files:
                (self.last / name).delete()
        for name, content in self.files.items():
            if (self.last / name).size() != len(content) or (self.last / name).read() != content:
                (self.last / name).write(content)

    def put(self, name: str, content: bytes) -> None:
        """Other content for a file, and its size and hash in the manifest."""
        (self.last / name).write(content)
        manifest = json.loads(self.files[MANIFEST])
        for entry in manifest["files"]:
            if entry["name"] == name:
                entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        (self.last / MANIFEST).write(signed(manifest))

    def _save(self, images: int) -> None:
        writers = [CheckpointWriter(self.run, GROUP, rank, WORKERS) for rank in range(WORKERS)]
        for rank, writer in enumerate(writers):
            slices = []
            for group in GROUPS:
                for name, value in values(images).items():
                    count = value.numel()
                    first, beyond = count * rank // WORKERS, count * (rank + 1) // WORKERS
                    part = value.flatten()[first:beyond]
                    if first < beyond:
                        slices.append(Slice(group, name, tuple(value.shape), first, part))
            writer.save(state(images), slices)
        for writer in reversed(writers):
            writer.wait()
            writer.give_up()


@pytest.fixture(scope="module")
def module_saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("fuzzed") / "run")


@pytest.fixture
def saved(module_saved: Saved, monkeypatch: pytest.MonkeyPatch) -> Iterator[Saved]:
    # Starting eight threads takes longer than reading these files.
    monkeypatch.setattr(contents_of_files, "READERS", 1)
    yield module_saved
    module_saved.restore()


# Mutations.


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


STRANGE = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2, 3, 12, 24, 2**31, 2**53, 2**62, 2**63, 10**30, 10**400),
        *(0.0, 12.0, 1.5, -1.5, 1e308, math.inf, -math.inf, math.nan),
        *("", "0", "weight", "..", "../x", "/etc/passwd", STATE, MANIFEST, "\x1b[31m", "\ud800"),
        *([], {}, [[]], [0], [1, 2, 3], {"a": 1}, nested(300), [1] * 200),
        *(slice_file(group, rank, WORKERS) for group in GROUPS for rank in range(WORKERS)),
    ]
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container below a value, with every key or index of it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in list(inside):
        yield value, key
        if isinstance(below, (dict, list)):
            yield from places(below)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value in which something is put, removed, moved or counted on, up to three times."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(value))
        if not found:
            break
        container, key = found[draw(st.integers(0, len(found) - 1))]
        act = draw(st.sampled_from(["put", "remove", "nudge", "add", "swap", "again"]))
        keys = list(container) if isinstance(container, dict) else range(len(container))
        other = keys[draw(st.integers(0, len(keys) - 1))]
        if act == "put":
            container[key] = copy.deepcopy(draw(STRANGE | st.integers() | st.text(max_size=4)))
        elif act == "remove":
            del container[key]
        elif act == "nudge" and type(container[key]) in (int, float):
            container[key] += draw(st.sampled_from([-12, -1, 1, 0.5, 12]))
        elif act == "add" and isinstance(container, dict):
            container[draw(st.text(max_size=4))] = copy.deepcopy(draw(STRANGE))
        elif act == "swap":
            container[key], container[other] = container[other], container[key]
        elif act == "again" and isinstance(container, list):
            container.insert(draw(st.integers(0, len(container))), copy.deepcopy(container[key]))
    return value


@st.composite
def spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are other ones, missing, or there twice."""
    at = draw(st.integers(0, len(content)))
    beyond = draw(st.integers(at, min(len(content), at + 40)))
    put = draw(
        st.sampled_from([b"", b"[" * 100_000, b"9" * 10_000, b"\0", b"\xff", content[:at]])
        | st.binary(max_size=8)
    )
    return content[:at] + put + content[beyond:]


def signed(value: Any) -> bytes:
    """A part or a manifest with the hash that its content has, if it is one at all."""
    if isinstance(value, dict):
        value = {name: below for name, below in value.items() if name != "sha256"}
        value["sha256"] = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    return json.dumps(value).encode()


def written(value: Any) -> bytes:
    return json.dumps(value).encode()


def contents(
    original: bytes, to_bytes: Callable[[Any], bytes] = written
) -> st.SearchStrategy[bytes]:
    """Mutations of a file, of which most are JSON and many have nothing wrong but one value."""
    by_value = changed(json.loads(original)).map(to_bytes)
    return st.one_of(by_value, by_value, by_value, spoilt(original))


def fuzz(
    count: int,
    contents: st.SearchStrategy[bytes],
    check: Callable[[bytes], object],
    seeds: tuple[bytes, ...] = (),
) -> None:
    """Checks so many mutations, and those that failed once; none takes a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=count,
        deadline=DEADLINE,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(contents)
    def holds(content: bytes) -> None:
        check(content)

    for seed in seeds:
        check(seed)
    holds()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + GIGABYTE_KIB


# What must hold.


def expected(read: Callable[[], Any]) -> Any:
    """What it returns, or the exception of ours that it raises, in one line."""
    try:
        return read()
    except ExpectedError as error:
        assert str(error) and "\n" not in str(error).strip()
        return error


def check_read(saved: Saved, state_may_be: State | None = None) -> bool:
    """The last checkpoint is read as it was saved, or refused; whether it was used."""
    reader = CheckpointReader(saved.last)
    refused = [isinstance(expected(lambda: reader.manifest), ExpectedError)]
    for group in GROUPS:
        found = expected(lambda group=group: reader.tensors(group))
        refused.append(isinstance(found, ExpectedError))
        if not refused[-1]:
            # A shape is told nowhere else: the elements and their order are.
            assert {name: value.flatten().tolist() for name, value in found.items()} == {
                name: value.flatten().tolist() for name, value in values(LAST).items()
            }
        for name, value in values(LAST).items():
            part = expected(lambda group=group, name=name: reader.run(group, name, 1, 30))
            if not isinstance(part, ExpectedError):
                whole = torch.cat([value.flatten(), torch.zeros(40)])
                assert torch.equal(part, whole[1:31])
    found = expected(lambda: reader.state)
    refused.append(isinstance(found, ExpectedError))
    if not refused[-1]:
        assert found == (state_may_be or state(LAST))

    used, told = expected(lambda: newest_sound(saved.run)), expected(lambda: verify(saved.last))
    if isinstance(used, ExpectedError):
        # Another version's, which is told and not passed over.
        assert type(used) is type(told) and "this version reads" in str(used)
        assert all(refused)
        return False
    assert used in (saved.previous, saved.last)
    assert (told == []) == (used == saved.last) == (not any(refused)), (told, used, refused)
    assert (saved.last / DAMAGED).exists() == (used == saved.previous and has_manifest(saved))
    # By the manifest and the sizes, all judge alike.
    whole = read_whole(saved.last) is not None
    assert newest(saved.run) == resolve(saved.run) == (saved.last if whole else saved.previous)
    assert whole == (not refused[0])
    return used == saved.last


def has_manifest(saved: Saved) -> bool:
    return (saved.last / MANIFEST).exists()


@counts
def test_a_mutated_manifest_is_read_as_it_was_written_or_refused(saved, count):
    def check(content: bytes) -> None:
        saved.restore()
        (saved.last / MANIFEST).write(content)
        check_read(saved)

    # Of one that is shorter by the manifest, what lies past its end was not looked at.
    swapped = json.loads(saved.files[MANIFEST])
    tensors = swapped["tensors"][GENERATOR]
    tensors["bias"], tensors["scale"] = tensors["scale"], tensors["bias"]
    fuzz(count, contents(saved.files[MANIFEST], signed), check, seeds=(signed(swapped),))


@counts
@pytest.mark.parametrize("rank", range(WORKERS))
def test_a_mutated_part_is_committed_as_it_was_written_or_refused(saved, count, rank):
    name = part_file(rank, WORKERS)

    def check(content: bytes) -> None:
        saved.restore()
        (saved.last / MANIFEST).delete()
        (saved.last / name).write(content)
        committed = expected(lambda: commit_abandoned(saved.run))
        assert committed is None or "this version reads" in str(committed)
        check_read(saved)

    fuzz(count // WORKERS, contents(saved.files[name], signed), check)


@counts
def test_a_file_with_a_mutated_header_is_read_as_it_was_written_or_refused(saved, count):
    name = slice_file(GENERATOR, 0, WORKERS)
    original = saved.files[name]
    begin = 8 + int.from_bytes(original[:8], "little")

    def with_header(header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + original[begin:]

    def check(content: bytes) -> None:
        saved.restore()
        saved.put(name, content)
        check_read(saved)

    headers = contents(original[8:begin])
    lengths = st.binary(min_size=8, max_size=8).map(lambda length: length + original[8:])
    fuzz(count, st.one_of(*[headers.map(with_header)] * 4, lengths), check)


@counts
def test_a_mutated_state_is_read_as_it_is_or_refused(saved, count):
    def check(content: bytes) -> None:
        saved.restore()
        saved.put(STATE, content)
        told = json.loads(content) if is_state(content) else None
        used = check_read(saved, State(**told) if told else None)
        assert used == (told is not None)

    unprintable = written({**asdict(state(LAST)), "\n": None})
    fuzz(count, contents(saved.files[STATE]), check, seeds=(unprintable,))


def is_state(content: bytes) -> bool:
    """Whether it could be a state of the last checkpoint, found out in another way."""
    try:
        told = json.loads(content)
        content.decode()
        json.dumps(told, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    may_lack = {"generator_steps", "discriminator_steps"}
    known = asdict(state(LAST)).keys()
    if not isinstance(told, dict) or not known - may_lack <= told.keys() <= known:
        return False
    steps = [told[name] for name in may_lack & told.keys() if told[name] is not None]
    numbers = [told["images"], told["noise_stream"], *steps]
    texts = [told["data_digest"], told["config"]]
    versions = told["versions"]
    return (
        all(type(number) is int and 0 <= number <= 2**62 for number in numbers)
        and told["images"] == LAST
        and all(isinstance(text, str) for text in texts)
        and isinstance(versions, dict)
        and all(isinstance(version, str) for version in versions.values())
    )


# What a run keeps beside its checkpoints.


@counts
def test_a_mutated_lease_holds_as_long_as_it_says_or_as_a_lease_does(saved, count):
    place = saved.previous / "lease-0123abcd.json"

    def check(content: bytes) -> None:
        place.write(content)
        now = time.time()
        until = until_of(content, now)
        # Just written, what says nothing of use still holds.
        assert leased(saved.previous) == (until is None or until > now)
        place.delete()

    def until_of(content: bytes, now: float) -> float | None:
        try:
            until = json.loads(content.decode())["until"]
            known = type(until) in (int, float) and until <= now + LONGEST_LEASE_SECONDS
            return float(until) if known else None
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            return None

    for seconds in (LEASE_SECONDS, -LEASE_SECONDS):
        lease = json.dumps({"until": time.time() + seconds}).encode()
        fuzz(count // 2, contents(lease), check)


@counts
def test_with_a_mutated_list_of_the_best_nothing_goes_that_might_be_among_them(saved, count):
    place, folders = saved.run / BEST, [saved.previous, saved.last]
    deleted: list[Location] = []
    # Not by files: making a checkpoint takes longer than all else here.
    plain = Location.delete_folder, Location.delete

    def noted(found: Location) -> None:
        deleted.extend(each for each in folders if found.uri.startswith(each.uri))

    def check(content: bytes) -> None:
        place.write(content)
        deleted.clear()
        found = expected(lambda: read_best(saved.run))
        drop_old(saved.run, 1)
        if isinstance(found, ExpectedError):
            assert deleted == []
        else:
            assert all(isinstance(name, str) for name in found)
            assert found == json.loads(content)
            assert (saved.previous in deleted) == (saved.previous.name not in found)
        assert saved.last not in deleted

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Location, "delete_folder", noted)
        patched.setattr(Location, "delete", noted)
        write_best(saved.run, [saved.previous.name, folder_name(48, "00ff00"), saved.last.name])
        fuzz(count, contents(place.read()), check)
    assert plain == (Location.delete_folder, Location.delete)
    place.delete()


@counts
def test_a_mutated_record_of_roll_backs_is_read_as_it_is_or_refused(saved, count):
    place = saved.run / ROLL_BACKS

    def check(content: bytes) -> None:
        place.write(content)
        found = expected(lambda: read_roll_backs(saved.run))
        if not isinstance(found, ExpectedError):
            told = [
                (each["images"], each["to_images"], each["reason"]) for each in json.loads(content)
            ]
            assert [(each.images, each.to_images, each.reason) for each in found] == told
            for images, to_images, reason in told:
                assert type(images) is type(to_images) is int and type(reason) is str
                assert 0 <= images <= 2**62 and 0 <= to_images <= 2**62
        refused = expected(lambda: add_roll_back(saved.run, RollBack(2, 1, "x")))
        assert (refused is None) == (not isinstance(found, ExpectedError))
        assert refused is None or place.read() == content

    for images in (4096, 9000):
        add_roll_back(saved.run, RollBack(images, images - 96, "figures that are not finite"))
    fuzz(count, contents(place.read()), check)
    place.delete()
