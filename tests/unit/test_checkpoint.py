"""A checkpoint is whole or it is none; whoever saved it, it is read as it was."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cat_ray.checkpoint.layout import (
    DISCRIMINATOR,
    GENERATOR,
    GENERATOR_MOMENTS,
    MANIFEST,
    STATE,
    State,
    average_group,
    part_file,
    read_manifest,
    read_whole,
    slice_file,
)
from cat_ray.checkpoint.read import (
    CheckpointReader,
    load_generator,
    newest,
    read_config,
    read_state,
    read_tensors,
    resolve,
)
from cat_ray.checkpoint.records import FORMAT
from cat_ray.checkpoint.write import CheckpointWriter, Slice
from cat_ray.config import dump, parse
from cat_ray.errors import BadInput
from cat_ray.model.build import build_generator
from cat_ray.storage import Location, locate

GROUPS = (GENERATOR, DISCRIMINATOR, GENERATOR_MOMENTS, average_group(0.9))
WORKERS = 2
FILES = [slice_file(group, rank, WORKERS) for group in GROUPS for rank in range(WORKERS)]
Groups = dict[str, dict[str, Tensor]]


def tensors(seed: int) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    shapes = {"weight": (3, 5), "bias": (7,), "gain": (1,), "scale": ()}
    return {name: torch.randn(shape, generator=numbers) for name, shape in shapes.items()}


def groups(seed: int = 0) -> Groups:
    return {group: tensors(seed + place) for place, group in enumerate(GROUPS)}


def state(images: int, config: str = "") -> State:
    return State(images, 2, "digest", config, {"python": "3.11", "torch": "2"})


def slices(held: Groups, rank: int, workers: int) -> list[Slice]:
    """A worker's share of each tensor; of a small one some have nothing."""
    found = []
    for group, named in held.items():
        for name, value in named.items():
            count = value.numel()
            first, beyond = count * rank // workers, count * (rank + 1) // workers
            if first < beyond:
                shape = tuple(value.shape)
                found.append(Slice(group, name, shape, first, value.flatten()[first:beyond]))
    return found


def save(run: Location, saved: State, held: Groups, workers: int = WORKERS) -> Location:
    writers = [CheckpointWriter(run, "3f9a1c", rank, workers) for rank in range(workers)]
    for rank, writer in enumerate(writers):
        writer.save(saved, slices(held, rank, workers))
    # The first one last: it waits for the others, and they might have failed.
    waited = [writer.wait() for writer in reversed(writers)]
    return waited[-1][0].location


def local(place: Location) -> Path:
    assert place.local_path is not None
    return place.local_path


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


# What is written is read.


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_tensors_and_state_are_read_as_they_were_however_many_workers_saved(run, workers):
    checkpoint = save(run, state(32), groups(), workers)
    for group, written in groups().items():
        read = read_tensors(checkpoint, group)
        assert read.keys() == written.keys()
        for name, value in written.items():
            assert read[name].dtype == value.dtype
            assert torch.equal(read[name], value)
    assert read_state(checkpoint) == state(32)


def test_a_checkpoint_is_readable_with_safetensors_and_json_alone(run):
    folder = local(save(run, state(32), groups()))
    manifest = json.loads((folder / MANIFEST).read_text())
    entry = manifest["tensors"][DISCRIMINATOR]["weight"]
    flat = [safetensors.torch.load_file(folder / file)["weight"] for file, _, _ in entry["slices"]]
    read = torch.cat(flat).view(entry["shape"])
    assert torch.equal(read, groups()[DISCRIMINATOR]["weight"])
    assert json.loads((folder / STATE).read_text())["images"] == 32


def test_the_manifest_lists_every_file_but_itself_and_the_parts_that_it_joins(run):
    folder = local(save(run, state(32), groups()))
    listed = {record["name"] for record in json.loads((folder / MANIFEST).read_text())["files"]}
    assert listed == {*FILES, STATE}
    parts = {part_file(rank, WORKERS) for rank in range(WORKERS)}
    assert {path.name for path in folder.iterdir()} == {*listed, *parts, MANIFEST}


@pytest.fixture(scope="module")
def by_workers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, CheckpointReader]:
    """The same checkpoint as saved by 1, 2, 3 and 8 workers."""
    return {
        workers: CheckpointReader(
            save(locate(str(tmp_path_factory.mktemp("run"))), state(32), groups(), workers)
        )
        for workers in (1, 2, 3, 8)
    }


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from([1, 2, 3, 8]), st.integers(0, 20), st.integers(1, 25))
def test_any_run_of_a_tensor_is_read_with_zeros_past_its_end(by_workers, workers, offset, length):
    # What a worker of another number, at another stage, asks for.
    found = by_workers[workers].run(GENERATOR, "weight", offset, length)
    whole = groups()[GENERATOR]["weight"].flatten()
    assert torch.equal(found, torch.cat([whole, torch.zeros(50)])[offset : offset + length])


def test_a_file_is_read_once_however_many_runs_of_it_are_asked_for(run, monkeypatch):
    reader = CheckpointReader(save(run, state(32), groups()))
    read: list[str] = []
    plain = Location.read

    def counted(place: Location) -> bytes:
        read.append(place.name)
        return plain(place)

    monkeypatch.setattr(Location, "read", counted)
    for offset in range(15):
        reader.run(GENERATOR, "weight", offset, 3)
    reader.tensors(GENERATOR)
    assert sorted(read) == sorted([MANIFEST, *FILES[:WORKERS]])


def test_the_newest_has_the_most_images_whenever_it_was_written(run):
    for images in (96, 32, 100_000, 64):
        save(run, state(images), groups())
    found = newest(run)
    assert found is not None
    assert read_state(found).images == 100_000


def test_a_run_without_a_checkpoint_has_none(run):
    assert newest(run) is None
    with pytest.raises(BadInput, match="neither a complete checkpoint nor a run that has one"):
        resolve(run)


def test_a_run_stands_for_its_newest_checkpoint_and_a_checkpoint_for_itself(run):
    older, newer = (save(run, state(images), groups()) for images in (32, 64))
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


DAMAGE = {
    **{f"no {name}": without(name) for name in (*FILES, STATE, MANIFEST)},
    **{f"{name} truncated": truncated(name) for name in (*FILES, STATE, MANIFEST)},
    **{
        f"manifest {content!r}": manifest(content)
        for content in (b"", b"{", b"[]", b"null", b"3", b'"files"', b"{}", b"\xff\xfe")
    },
    "manifest of nothing": manifest(b'{"format": %d, "files": [], "tensors": {}}' % FORMAT),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_is_passed_over_for_the_checkpoint_before(run, damage):
    previous, last = save(run, state(32), groups()), save(run, state(64), groups(9))
    assert newest(run) == last
    damage(local(last))
    assert read_manifest(last) is None
    assert newest(run) == previous
    assert resolve(run) == previous


def test_without_the_parts_a_committed_checkpoint_is_whole(run):
    checkpoint = save(run, state(32), groups())
    for rank in range(WORKERS):
        (checkpoint / part_file(rank, WORKERS)).delete()
    assert newest(run) == checkpoint


def test_a_checkpoint_of_another_format_is_told_and_not_passed_over(run):
    save(run, state(32), groups())
    manifest(b'{"format": 1, "files": []}')(local(save(run, state(64), groups())))
    with pytest.raises(BadInput, match=f"has format 1, this version reads {FORMAT}"):
        newest(run)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found(run, name):
    checkpoint = save(run, state(32), groups())
    path = local(checkpoint) / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    group = next(group for group in GROUPS if name.startswith(f"{group}.0"))
    with pytest.raises(BadInput, match=f"/{name} is damaged: its sha256"):
        read_tensors(checkpoint, group)


def test_a_flipped_byte_of_the_state_is_found(run):
    checkpoint = save(run, state(32), groups())
    path = local(checkpoint) / STATE
    path.write_bytes(path.read_bytes().replace(b'"images": 32', b'"images": 33'))
    with pytest.raises(BadInput, match=f"{STATE} is damaged"):
        read_state(checkpoint)


def test_a_group_that_the_manifest_does_not_list_is_refused_with_those_that_it_does(run):
    checkpoint = save(run, state(32), groups())
    (checkpoint / "other.00-of-01.safetensors").write((checkpoint / FILES[0]).read())
    with pytest.raises(BadInput, match=r"has no other, it has discriminator, generator,") as it:
        read_tensors(checkpoint, "other")
    assert average_group(0.9) in str(it.value)


# The generator of a checkpoint.


@pytest.mark.parametrize(
    ("decay", "group"),
    [
        (None, average_group(0.9)),
        (0.9, average_group(0.9)),
        (0.5, average_group(0.5)),
        (0.0, GENERATOR),
    ],
)
def test_the_generator_that_is_loaded_is_the_one_that_was_saved(run, tiny_job, decay, group):
    config = parse(tiny_job, "job.yaml")
    networks = {}
    for seed, name in enumerate((GENERATOR, average_group(0.9), average_group(0.5))):
        torch.manual_seed(seed)
        networks[name] = build_generator(config)
    weights = {name: network.state_dict() for name, network in networks.items()}
    checkpoint = save(run, state(32, dump(config)), weights)
    assert read_whole(checkpoint) is not None
    assert read_config(checkpoint) == config

    loaded = load_generator(checkpoint, decay)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    z = torch.randn(4, config.model.generator.latent_width)
    labels = torch.arange(4)
    with torch.no_grad():
        outputs = {name: network(z, labels) for name, network in networks.items()}
        alike = [name for name, output in outputs.items() if torch.equal(output, loaded(z, labels))]
    assert alike == [group]


def test_an_average_that_was_not_kept_is_refused_with_those_that_were(run, tiny_job):
    config = parse(tiny_job, "job.yaml")
    weights = {average_group(0.9): build_generator(config).state_dict()}
    checkpoint = save(run, state(32, dump(config)), weights)
    with pytest.raises(BadInput, match=r"has no generator\.average-0\.7, it has") as caught:
        load_generator(checkpoint, 0.7)
    assert average_group(0.9) in str(caught.value)
