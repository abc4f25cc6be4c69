"""Content that is wrong, but has every hash right, is damage: to all readers, in the same way."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from cat_ray.checkpoint.layout import (
    DAMAGED,
    GENERATOR,
    GENERATOR_MOMENTS,
    MANIFEST,
    STATE,
    State,
    average_group,
    parse_manifest,
    read_manifest,
    read_whole,
    slice_file,
)
from cat_ray.checkpoint.read import (
    CheckpointReader,
    load_generator,
    newest,
    newest_sound,
    resolve,
    verify,
)
from cat_ray.checkpoint.write import CheckpointWriter, Slice
from cat_ray.cli import app
from cat_ray.config import dump, parse
from cat_ray.errors import BadInput, Damaged, StorageDown
from cat_ray.model.build import build_generator
from cat_ray.storage import Location, locate

GROUPS = (GENERATOR, GENERATOR_MOMENTS)
WORKERS = 2
FIRST, SECOND = (slice_file(GENERATOR, rank, WORKERS) for rank in range(WORKERS))
# As commit e108eef wrote it: a run begun there goes on.
WRITTEN_BY_E108EEF = b"""{
 "format": 2,
 "files": [
  {
   "name": "generator.00-of-01.safetensors",
   "bytes": 100,
   "sha256": "3f"
  },
  {
   "name": "state.json",
   "bytes": 3,
   "sha256": "9a"
  }
 ],
 "tensors": {
  "generator": {
   "weight": {
    "shape": [
     2,
     3
    ],
    "slices": [
     [
      "generator.00-of-01.safetensors",
      0,
      6
     ]
    ]
   }
  }
 },
 "sha256": "DIGEST"
}"""


def values(images: int) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(images)
    shapes = {"weight": (4, 6), "bias": (8,)}
    return {name: torch.randn(shape, generator=numbers) for name, shape in shapes.items()}


def save(run: Location, images: int) -> Location:
    """Two workers save halves of two tensors, in two groups."""
    writers = [CheckpointWriter(run, "3f9a1c", rank, WORKERS) for rank in range(WORKERS)]
    for rank, writer in enumerate(writers):
        slices = []
        for group in GROUPS:
            for name, value in values(images).items():
                half = value.numel() // 2
                part = value.flatten()[rank * half : (rank + 1) * half]
                slices.append(Slice(group, name, tuple(value.shape), rank * half, part))
        writer.save(State(images, 0, "digest", "", {"python": "3"}), slices)
    for writer in reversed(writers):
        writer.wait()
        writer.give_up()
    found = newest(run)
    assert found is not None
    return found


def local(place: Location) -> Path:
    assert place.local_path is not None
    return place.local_path


def sign(manifest: dict[str, Any]) -> bytes:
    """A manifest's content with the hash that this content has."""
    unsigned = {name: value for name, value in manifest.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(unsigned).encode()).hexdigest()
    return json.dumps({**unsigned, "sha256": digest}).encode()


def change(checkpoint: Location, act: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read())
    act(manifest)
    (checkpoint / MANIFEST).write(sign(manifest))


def put(checkpoint: Location, name: str, content: bytes) -> None:
    """Other content for a file, and its size and hash in the manifest."""
    (checkpoint / name).write(content)

    def record(manifest: dict[str, Any]) -> None:
        (entry,) = (each for each in manifest["files"] if each["name"] == name)
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    change(checkpoint, record)


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


# Manifests.


def entry(manifest: dict[str, Any], tensor: str = "weight") -> dict[str, Any]:
    return manifest["tensors"][GENERATOR][tensor]


def listed(manifest: dict[str, Any], name: str = FIRST) -> dict[str, Any]:
    return next(each for each in manifest["files"] if each["name"] == name)


def deep() -> bytes:
    return b'{"format": 2, "files": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a range is missing": lambda m: entry(m)["slices"].pop(),
    "the first range is missing": lambda m: entry(m)["slices"].pop(0),
    "all ranges are missing": lambda m: entry(m)["slices"].clear(),
    "a range is there twice": lambda m: entry(m)["slices"].append(entry(m)["slices"][1]),
    "ranges overlap": lambda m: entry(m)["slices"].__setitem__(1, [SECOND, 11, 13]),
    "a negative offset": lambda m: entry(m)["slices"].__setitem__(0, [FIRST, -12, 24]),
    "a negative length": lambda m: entry(m)["slices"].append([FIRST, 24, -1]),
    "an empty range": lambda m: entry(m)["slices"].append([FIRST, 24, 0]),
    "an offset that is no integer": lambda m: entry(m)["slices"][0].__setitem__(1, 0.0),
    "an offset of false": lambda m: entry(m)["slices"][0].__setitem__(1, False),
    "an offset as text": lambda m: entry(m)["slices"][0].__setitem__(1, "0"),
    "a slice of two": lambda m: entry(m)["slices"][0].pop(),
    "no slices": lambda m: entry(m).pop("slices"),
    "no shape": lambda m: entry(m).pop("shape"),
    "an unknown key": lambda m: entry(m).update(dtype="F32"),
    "a larger shape": lambda m: entry(m).update(shape=[4, 7]),
    "a shape of booleans": lambda m: entry(m).update(shape=[True] * 3),
    "a shape of floats": lambda m: entry(m).update(shape=[4.0, 6]),
    "a negative shape": lambda m: entry(m).update(shape=[-4, -6]),
    "a shape with 0": lambda m: entry(m).update(shape=[0, 24], slices=[]),
    "a shape of thousands of dimensions": lambda m: entry(m).update(shape=[4, 6, *[1] * 5000]),
    "a huge tensor": lambda m: entry(m).update(
        shape=[1 << 30, 1 << 30], slices=[[FIRST, 0, 1 << 60]]
    ),
    "a number of a thousand digits": lambda m: entry(m).update(shape=[10**1000]),
    "a tensor that is a list": lambda m: m["tensors"][GENERATOR].update(weight=[]),
    "a group that is a list": lambda m: m["tensors"].update({GENERATOR: []}),
    "no tensors": lambda m: m.pop("tensors"),
    "a tensor that no file has": lambda m: m["tensors"][GENERATOR].update(other=entry(m)),
    "a tensor less": lambda m: m["tensors"][GENERATOR].pop("weight"),
    "a tensor with a name of two lines": lambda m: m["tensors"][GENERATOR].update(
        {"a\nb": entry(m)}
    ),
    "a group less": lambda m: m["tensors"].pop(GENERATOR_MOMENTS),
    "a file that is not listed": lambda m: m["files"].remove(listed(m)),
    "another group's file": lambda m: entry(m)["slices"][0].__setitem__(
        0, slice_file(GENERATOR_MOMENTS, 0, WORKERS)
    ),
    "two slices in one file": lambda m: entry(m).update(slices=[[FIRST, 0, 12], [FIRST, 12, 12]]),
    "a file with a path": lambda m: listed(m).update(name=f"../3f9a1c/{FIRST}"),
    "an absolute file": lambda m: listed(m).update(name="/etc/passwd"),
    "a file of another name": lambda m: m["files"].append(
        {"name": "passwords", "bytes": 3, "sha256": ""}
    ),
    "a file twice": lambda m: m["files"].append(listed(m)),
    "a name that is no text": lambda m: listed(m).update(name=7),
    "a name that can't be encoded": lambda m: listed(m).update(name="\ud800"),
    "negative bytes": lambda m: listed(m).update(bytes=-1),
    "bytes of true": lambda m: listed(m).update(bytes=True),
    "more bytes": lambda m: listed(m).update(bytes=10**6),
    "a hash that is null": lambda m: listed(m).update(sha256=None),
    "files that are a number": lambda m: m.update(files=7),
    "no files": lambda m: m.update(files=[]),
    "no state": lambda m: m["files"].remove(listed(m, STATE)),
    "a format that is text": lambda m: m.update(format="2"),
    "a format that is a float": lambda m: m.update(format=2.0),
}


def check_all_refuse(run: Location, previous: Location, last: Location) -> None:
    """Whoever reads a run takes the checkpoint before; whoever reads this one says it's damaged."""
    for find in (newest_sound, newest, resolve):
        assert find(run) == previous, find.__name__
    assert read_manifest(last) is None and read_whole(last) is None
    told = verify(last)
    assert told and all(line.startswith(last.uri) for line in told)
    assert not any("\n" in line for line in told)
    reader = CheckpointReader
    for read in (
        lambda: resolve(last),
        lambda: reader(last).state,
        lambda: reader(last).tensors(GENERATOR),
        lambda: reader(last).run(GENERATOR, "weight", 0, 24),
    ):
        with pytest.raises(Damaged, match=r"is damaged|doesn't exist"):
            read()


# What only the files' own content tells.
BY_CONTENT = ("a tensor that no file has", "a tensor less")


@pytest.mark.parametrize("wrong", MANIFESTS.values(), ids=MANIFESTS)
def test_a_signed_manifest_that_says_what_cannot_be_is_damaged_to_everyone(run, wrong, request):
    previous, last = save(run, 32), save(run, 64)
    change(last, wrong)
    if any(f"[{name}]" in request.node.name for name in BY_CONTENT):
        check_files_refused(run, previous, last)
    else:
        check_all_refuse(run, previous, last)


def test_a_manifest_of_a_hundred_thousand_levels_is_damaged_to_everyone(run):
    previous, last = save(run, 32), save(run, 64)
    (last / MANIFEST).write(deep())
    check_all_refuse(run, previous, last)


def test_a_manifest_is_read_and_written_as_commit_e108eef_did():
    unsigned = json.loads(WRITTEN_BY_E108EEF)
    del unsigned["sha256"]
    digest = hashlib.sha256(json.dumps(unsigned).encode()).hexdigest()
    content = WRITTEN_BY_E108EEF.replace(b"DIGEST", digest.encode())
    assert parse_manifest(content).to_json() == content


def test_inspect_says_damaged_and_no_sampler_gets_a_generator(checkpoint):
    # On e108eef --verify passed, and the missing range was memory as it happened to be.
    def shorten(manifest: dict[str, Any]) -> None:
        (tensor, *_) = manifest["tensors"][average_group(0.9)].values()
        tensor["slices"].clear()

    change(checkpoint, shorten)
    for arguments in (["--verify"], []):
        told = CliRunner().invoke(app, ["inspect", checkpoint.uri, *arguments])
        assert told.exit_code == 2
        assert f"{checkpoint.uri}/{MANIFEST} is damaged: " in told.stderr
        assert len(told.stderr.splitlines()) == 1
    with pytest.raises(Damaged, match=f"{MANIFEST} is damaged"):
        load_generator(checkpoint)


# The other files.


def check_files_refused(run: Location, previous: Location, last: Location) -> None:
    """The sizes are right, so that it takes reading the files to tell."""
    assert newest_sound(run) == previous
    told = verify(last)
    assert told and all(f"{last.uri}/" in line and " is damaged: " in line for line in told)
    reader = CheckpointReader(last)
    refused = 0
    for read in (
        lambda: reader.state,
        *(lambda group=group: reader.tensors(group) for group in GROUPS),
    ):
        try:
            read()
        except BadInput:
            refused += 1
    assert refused


def header(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    written = json.dumps(tensors).encode()
    return len(written).to_bytes(8, "little") + written + data


def f32(begin: int, length: int, **changes: object) -> dict[str, object]:
    offsets = [4 * begin, 4 * (begin + length)]
    return {"dtype": "F32", "shape": [length], "data_offsets": offsets, **changes}


SLICES = {
    "a tensor is missing": safetensors.torch.save({"weight": torch.zeros(12)}),
    "a tensor more": safetensors.torch.save(
        {"weight": torch.zeros(12), "bias": torch.zeros(4), "more": torch.zeros(1)}
    ),
    "a shorter tensor": safetensors.torch.save({"weight": torch.zeros(11), "bias": torch.ones(5)}),
    "another type": safetensors.torch.save(
        {"weight": torch.zeros(12, dtype=torch.float64), "bias": torch.ones(4)}
    ),
    "integers": safetensors.torch.save(
        {"weight": torch.zeros(12, dtype=torch.int32), "bias": torch.ones(4)}
    ),
    "the tensor's shape": safetensors.torch.save(
        {"weight": torch.zeros(2, 6), "bias": torch.ones(4)}
    ),
    "no header": b"\xff" * 200,
    "zeros": b"\0" * 200,
    "a header beyond the end": (10**6).to_bytes(8, "little") + b"{" * 192,
    "a header of 2**63 bytes": (2**63).to_bytes(8, "little") + b"{" * 192,
    "a deep header": (192).to_bytes(8, "little") + b"[" * 192,
    "offsets outside": header({"weight": f32(0, 12), "bias": f32(10**6, 4)}, b"\0" * 64),
    "negative offsets": header(
        {"weight": f32(0, 12), "bias": f32(12, 4, data_offsets=[-16, 0])}, b"\0" * 64
    ),
    "offsets that overlap": header({"weight": f32(0, 12), "bias": f32(8, 4)}, b"\0" * 64),
    "a gap": header({"weight": f32(0, 12), "bias": f32(13, 4)}, b"\0" * 68),
    "something behind": header({"weight": f32(0, 12), "bias": f32(12, 4)}, b"\0" * 65),
    "a shape of true": header(
        {"weight": f32(0, 12, shape=[True] * 12), "bias": f32(12, 4)}, b"\0" * 64
    ),
    "metadata that is a number": header(
        {"__metadata__": 7, "weight": f32(0, 12), "bias": f32(12, 4)}, b"\0" * 64
    ),
}


@pytest.mark.parametrize("content", SLICES.values(), ids=SLICES)
def test_a_file_that_does_not_hold_its_slices_is_damaged_to_everyone(run, content):
    previous, last = save(run, 32), save(run, 64)
    put(last, FIRST, content)
    check_files_refused(run, previous, last)
    with pytest.raises(Damaged, match="is damaged"):
        CheckpointReader(last).run(GENERATOR, "weight", 0, 24)


STATES = {
    name: json.dumps(content).encode()
    for name, content in {
        "a list": [],
        "null": None,
        "nothing": {},
        "another program's": {"epoch": 3, "step": 700},
        "a key less": {"images": 64, "noise_stream": 0, "data_digest": "", "config": ""},
        "a key more": {**json.loads(State(64, 0, "", "", {}).to_json()), "more": 1},
        "images as text": {**json.loads(State(64, 0, "", "", {}).to_json()), "images": "64"},
        "images as a float": {**json.loads(State(64, 0, "", "", {}).to_json()), "images": 64.0},
        "images of true": {**json.loads(State(64, 0, "", "", {}).to_json()), "images": True},
        "negative images": json.loads(State(-64, 0, "", "", {}).to_json()),
        "another checkpoint's images": json.loads(State(32, 0, "", "", {}).to_json()),
        "a negative stream": json.loads(State(64, -1, "", "", {}).to_json()),
        "a config that is a list": {
            **json.loads(State(64, 0, "", "", {}).to_json()),
            "config": ["seed: 1"],
        },
        "versions that are numbers": {
            **json.loads(State(64, 0, "", "", {}).to_json()),
            "versions": {"torch": 2},
        },
    }.items()
} | {
    "empty": b"",
    "torn": State(64, 0, "", "", {}).to_json()[:-9],
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "a number of 10,000 digits": b'{"images": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", STATES.values(), ids=STATES)
def test_a_foreign_state_is_damaged_to_everyone(run, content):
    previous, last = save(run, 32), save(run, 64)
    put(last, STATE, content)
    check_files_refused(run, previous, last)
    with pytest.raises(Damaged, match=f"/{STATE} is damaged: "):
        CheckpointReader(last).state  # noqa: B018 it is read


def test_a_checkpoint_may_be_copied_to_a_folder_of_any_name(run, tmp_path):
    last = save(run, 64)
    local(last).rename(tmp_path / "my-favourite")
    copy = locate(str(tmp_path / "my-favourite"))
    assert resolve(copy) == copy and verify(copy) == []
    assert CheckpointReader(copy).state.images == 64


def test_a_tensor_that_a_checkpoint_has_not_is_never_read_as_zeros(run):
    with pytest.raises(Damaged, match=r"has no generator: other"):
        CheckpointReader(save(run, 32)).run(GENERATOR, "other", 0, 3)


def test_tensors_that_do_not_fit_their_network_are_told_by_name(run, tiny_job, save_checkpoint):
    config = parse(tiny_job, "job.yaml")
    weights = dict(build_generator(config).state_dict())
    name = next(name for name, value in weights.items() if value.dim() == 2)
    weights[name] = weights[name].T.contiguous()
    state = State(32, 0, "digest", dump(config), {})
    checkpoint = save_checkpoint(run, state, {GENERATOR: weights})
    with pytest.raises(Damaged, match=f"generator: {name} doesn't fit the network"):
        load_generator(checkpoint, 0.0)


# Only what was read, and is wrong, is damage.


@pytest.mark.parametrize("name", [FIRST, STATE, MANIFEST])
@pytest.mark.parametrize("error", [StorageDown, BadInput])
def test_a_file_that_cannot_be_read_is_no_damage_and_no_older_one_is_taken(
    run, monkeypatch, name, error, caplog
):
    save(run, 32)
    last, plain = save(run, 64), Location.read

    def refused(place: Location) -> bytes:
        if place.uri == (last / name).uri:
            raise error(f"storage failed at {place.uri}")
        return plain(place)

    with monkeypatch.context() as patched:
        patched.setattr(Location, "read", refused)
        for read in (newest_sound, lambda run: verify(last)):
            with pytest.raises(error, match="storage failed at") as caught:
                read(run)
            assert type(caught.value) is error
    assert not (last / DAMAGED).exists()
    assert caplog.messages == []
    assert newest_sound(run) == last


def test_a_read_that_fails_for_a_while_is_waited_for(run, monkeypatch):
    save(run, 32)
    last, failures = save(run, 64), iter(range(2))
    plain = last.filesystem.open_input_file

    class Failing:
        """Arrow's file system, where the first reads fail as on a network mount that is away."""

        def __getattr__(self, name: str) -> object:
            return getattr(last.filesystem, name)

        def open_input_file(self, path: str) -> object:
            if path.endswith(FIRST) and next(failures, None) is not None:
                raise OSError(116, "Stale file handle")
            return plain(path)

    monkeypatch.setattr("cat_ray.storage_errors.FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(Location, "local_path", property(lambda place: Path(place.path)))
    patient = Location(Failing(), run.path, run.uri, retry_seconds=60)  # pyright: ignore
    found = newest_sound(patient)
    assert found is not None and found.uri == last.uri
    assert next(failures, None) is None


def test_a_sound_checkpoint_that_was_marked_as_damaged_is_used_and_no_longer_marked(run):
    save(run, 32)
    last = save(run, 64)
    # As earlier versions did where a read failed.
    (last / DAMAGED).write(b"storage failed at ...")
    assert newest_sound(run) == last
    assert not (last / DAMAGED).exists()


def test_where_no_mark_can_be_made_the_older_checkpoint_is_used_nevertheless(
    run, monkeypatch, caplog
):
    previous, last = save(run, 32), save(run, 64)
    put(last, FIRST, b"nothing")

    def refused(place: Location, content: bytes) -> None:
        raise BadInput(f"storage failed at {place.uri}: read-only")

    monkeypatch.setattr(Location, "write", refused)
    assert newest_sound(run) == previous
    assert "read-only" in caplog.text


def test_a_checkpoint_that_is_deleted_while_it_is_verified_does_not_come_back(run, monkeypatch):
    previous, last = save(run, 32), save(run, 64)
    plain = Location.read

    def deleted_first(place: Location) -> bytes:
        if place.uri.startswith(last.uri) and place.name == STATE:
            last.delete_folder()
        return plain(place)

    monkeypatch.setattr(Location, "read", deleted_first)
    assert newest_sound(run) == previous
    assert not last.is_folder()
