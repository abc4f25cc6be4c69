"""A checkpoint is whole or it is none: what is written, damaged, killed, filled up and read."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cat_ray.checkpoint.layout import (
    DISCRIMINATOR,
    DISCRIMINATOR_MOMENTS,
    FOLDER,
    GENERATOR,
    GENERATOR_MOMENTS,
    MANIFEST,
    STATE,
    State,
    average_file,
    folder_name,
    read_manifest,
)
from cat_ray.checkpoint.read import (
    load_generator,
    newest,
    read_config,
    read_state,
    read_tensors,
    resolve,
)
from cat_ray.checkpoint.write import drop_old, write_checkpoint
from cat_ray.config import dump, parse
from cat_ray.errors import BadInput
from cat_ray.model.build import build_generator
from cat_ray.storage import Location, locate

TENSOR_FILES = [
    GENERATOR,
    DISCRIMINATOR,
    GENERATOR_MOMENTS,
    DISCRIMINATOR_MOMENTS,
    average_file(0.9),
]
Files = list[tuple[str, dict[str, Tensor]]]


def tensors(seed: int) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(3, 5, generator=numbers),
        "transposed": torch.randn(4, 2, generator=numbers).T,
        "bf16": torch.randn(7, generator=numbers).bfloat16(),
        "steps": torch.tensor(seed),
    }


def files(seed: int = 0) -> Files:
    return [(name, tensors(seed + place)) for place, name in enumerate(TENSOR_FILES)]


def state(images: int, config: str = "") -> State:
    return State(images, "digest", config, {"python": "3.11", "torch": "2"})


def save(run: Location, images: int, seed: int = 0) -> Location:
    return write_checkpoint(run, state(images), files(seed))


def local(place: Location) -> Path:
    assert place.local_path is not None
    return place.local_path


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


# What is written is read.


def test_tensors_and_state_are_read_as_they_were_written(run):
    checkpoint = save(run, 32)
    for name, written in files():
        read = read_tensors(checkpoint, name)
        assert read.keys() == written.keys()
        for key, value in written.items():
            assert read[key].dtype == value.dtype
            assert torch.equal(read[key], value)
    assert read_state(checkpoint) == state(32)


def test_a_checkpoint_is_readable_with_safetensors_and_json_alone(run):
    folder = local(save(run, 32))
    read = safetensors.torch.load_file(folder / DISCRIMINATOR)
    assert torch.equal(read["weight"], tensors(1)["weight"])
    assert json.loads((folder / STATE).read_text())["images"] == 32
    listed = {record["name"] for record in json.loads((folder / MANIFEST).read_text())["files"]}
    assert listed | {MANIFEST} == {path.name for path in folder.iterdir()}
    assert listed == {*TENSOR_FILES, STATE}


@given(st.integers(0, 10**12 - 1), st.integers(0, 10**12 - 1))
def test_names_sort_as_the_images_do(one, other):
    assert (folder_name(one) < folder_name(other)) == (one < other)


def test_the_newest_has_the_most_images_whenever_it_was_written(run):
    for images in (96, 32, 100_000, 64):
        save(run, images)
    found = newest(run)
    assert found is not None
    assert read_state(found).images == 100_000


def test_a_run_without_a_checkpoint_has_none(run):
    assert newest(run) is None
    with pytest.raises(BadInput, match="neither a complete checkpoint nor a run that has one"):
        resolve(run)


def test_a_run_stands_for_its_newest_checkpoint_and_a_checkpoint_for_itself(run):
    older, newer = save(run, 32), save(run, 64)
    assert resolve(run) == newer
    assert resolve(older) == older


# What is not whole is no checkpoint.


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncated(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1])

    return act


def manifest(content: bytes) -> Callable[[Path], None]:
    return lambda folder: folder.joinpath(MANIFEST).write_bytes(content)


def another_format(folder: Path) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**values, "format": 2}))


DAMAGE = {
    "no manifest": without(MANIFEST),
    **{f"no {name}": without(name) for name in (*TENSOR_FILES, STATE)},
    **{f"{name} truncated": truncated(name) for name in (*TENSOR_FILES, STATE, MANIFEST)},
    "another format": another_format,
    **{
        f"manifest {content!r}": manifest(content)
        for content in (b"", b"{", b"[]", b"null", b"3", b'"files"', b"{}", b"\xff\xfe")
    },
    "manifest of strings": manifest(b'{"format": 1, "files": ["a"]}'),
    "manifest of unknown keys": manifest(b'{"format": 1, "files": [{"nmae": "a"}]}'),
    "manifest of nothing": manifest(b'{"format": 1, "files": []}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_is_passed_over_for_the_checkpoint_before(run, damage):
    previous, last = save(run, 32), save(run, 64, seed=9)
    assert newest(run) == last
    damage(local(last))
    assert not read_manifest(last)
    assert newest(run) == previous
    assert resolve(run) == previous


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_a_flipped_byte_is_found(run, name):
    checkpoint = save(run, 32)
    path = local(checkpoint) / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match=f"{name} is damaged: its sha256"):
        read_tensors(checkpoint, name)


def test_a_flipped_byte_of_the_state_is_found(run):
    checkpoint = save(run, 32)
    path = local(checkpoint) / STATE
    path.write_bytes(path.read_bytes().replace(b'"images": 32', b'"images": 33'))
    with pytest.raises(BadInput, match=f"{STATE} is damaged"):
        read_state(checkpoint)


def test_a_file_that_the_manifest_does_not_list_is_not_read(run):
    checkpoint = save(run, 32)
    (checkpoint / "other.safetensors").write((checkpoint / GENERATOR).read())
    with pytest.raises(BadInput, match=r"has no other\.safetensors, it has discriminator\.") as it:
        read_tensors(checkpoint, "other.safetensors")
    assert average_file(0.9) in str(it.value)


# Kills and full disks.


@pytest.mark.parametrize("writes", range(len(TENSOR_FILES) + 2))
def test_a_kill_at_any_moment_of_a_save_leaves_the_previous_checkpoint(run, monkeypatch, writes):
    previous = save(run, 32)
    before = {path.name: path.read_bytes() for path in local(previous).iterdir()}
    done: list[str] = []
    write = Location.write

    def until_killed(place: Location, content: bytes) -> None:
        if len(done) == writes:
            raise KeyboardInterrupt
        write(place, content)
        done.append(place.name)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Location, "write", until_killed)
        save(run, 64)
    assert newest(run) == previous
    assert {path.name: path.read_bytes() for path in local(previous).iterdir()} == before
    assert newest(run) != save(run, 64)
    assert newest(run) == run / FOLDER / folder_name(64)


def broken_off(after: int, seed: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The files of a save during which the worker is killed."""
    yield from files(seed)[:after]
    raise KeyboardInterrupt


def test_a_killed_save_over_a_truncated_checkpoint_leaves_the_previous_one(run):
    previous, last = save(run, 32), save(run, 64)
    truncated(GENERATOR)(local(last))
    assert newest(run) == previous
    # The work since is done again, at another world size: other weights of the same length.
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(run, state(64), broken_off(after=1, seed=9))
    assert newest(run) == previous


@pytest.mark.parametrize("name", [*TENSOR_FILES, STATE, MANIFEST])
def test_a_full_disk_is_told_with_the_remedy_and_leaves_the_previous_checkpoint(run, name):
    previous = save(run, 32)
    partial = run / FOLDER / folder_name(64) / f".{name}.partial"
    local(partial).parent.mkdir()
    # Every write to this device fails as on a full disk.
    local(partial).symlink_to("/dev/full")
    with pytest.raises(BadInput) as caught:
        save(run, 64)
    assert not (run / FOLDER / folder_name(64) / MANIFEST).exists()
    assert newest(run) == previous
    assert read_state(previous).images == 32
    message = str(caught.value)
    assert message.startswith(f"no space left for {run.uri}/{FOLDER}/{folder_name(64)}/{name} (")
    assert "free some and run the same command again; the previous checkpoint is whole" in message


def test_another_failure_of_the_storage_is_not_called_a_full_disk(run):
    (run / FOLDER).write(b"a file in the folder's place")
    with pytest.raises(BadInput, match="storage failed") as caught:
        save(run, 32)
    assert "no space" not in str(caught.value)


# Keeping few.


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [96]), (2, [64, 96]), (3, [32, 64, 96]), (9, [32, 64, 96])]
)
def test_the_newest_checkpoints_are_kept(run, keep, left):
    for images in (32, 64, 96):
        save(run, images)
    drop_old(run, keep)
    assert [folder.name for folder in (run / FOLDER).folders()] == list(map(folder_name, left))
    assert all(read_manifest(folder) for folder in (run / FOLDER).folders())


def test_an_unfinished_checkpoint_neither_counts_nor_goes(run):
    for images in (32, 64, 96, 128):
        save(run, images)
    without(MANIFEST)(local(run / FOLDER / folder_name(128)))
    drop_old(run, 2)
    left = [folder.name for folder in (run / FOLDER).folders()]
    assert left == list(map(folder_name, (64, 96, 128)))


def test_where_there_is_nothing_nothing_is_dropped(run):
    drop_old(run, 1)
    assert newest(run) is None


# The generator of a checkpoint.


@pytest.mark.parametrize(
    ("decay", "file"),
    [
        (None, average_file(0.9)),
        (0.9, average_file(0.9)),
        (0.5, average_file(0.5)),
        (0.0, GENERATOR),
    ],
)
def test_the_generator_that_is_loaded_is_the_one_that_was_saved(run, tiny_job, decay, file):
    config = parse(tiny_job, "job.yaml")
    networks = {}
    for seed, name in enumerate((GENERATOR, average_file(0.9), average_file(0.5))):
        torch.manual_seed(seed)
        networks[name] = build_generator(config)
    weights = [(name, network.state_dict()) for name, network in networks.items()]
    checkpoint = write_checkpoint(run, state(32, dump(config)), weights)
    assert read_config(checkpoint) == config

    loaded = load_generator(checkpoint, decay)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    z = torch.randn(4, config.model.generator.latent_width)
    labels = torch.arange(4)
    with torch.no_grad():
        outputs = {name: network(z, labels) for name, network in networks.items()}
    assert [name for name, output in outputs.items() if torch.equal(output, loaded(z, labels))] == [
        file
    ]


def test_an_average_that_was_not_kept_is_refused_with_those_that_were(run, tiny_job):
    config = parse(tiny_job, "job.yaml")
    weights = build_generator(config).state_dict()
    checkpoint = write_checkpoint(run, state(32, dump(config)), [(average_file(0.9), weights)])
    with pytest.raises(BadInput, match=r"has no generator\.average-0\.7\.safetensors") as caught:
        load_generator(checkpoint, 0.7)
    assert average_file(0.9) in str(caught.value)
