"""Samples read block by block: those of the whole shard, with stand-ins for broken ones."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cat_ray.config import Config, parse
from cat_ray.data.cache import Cache
from cat_ray.data.decode import decode_sample
from cat_ray.data.index import Index, Shard, write_index
from cat_ray.data.order import Stream, lane_pieces, member_order, pieces
from cat_ray.data.packs import Pack
from cat_ray.data.read import (
    Batch,
    Part,
    Reading,
    fetch,
    part_of,
    read_images,
    read_parts,
    read_shard,
)
from cat_ray.data.reading_task import PIECES, packed, read_pieces
from cat_ray.data.shard_file import Entry, Written, write_shard_file
from cat_ray.data.stream import Due, RankStream, reading_of
from cat_ray.data.tar import sample_extents
from cat_ray.errors import BadInput, Damaged
from cat_ray.storage import Location, locate
from cat_ray.training.lanes import share

SIDE = 8
some = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Block sizes of a shard with six samples, with and without a smaller last one.
SIZES = [1, 2, 4, 6, 9]


def grey(value: int, side: int = SIDE) -> bytes:
    content = io.BytesIO()
    Image.new("L", (side, side), value).save(content, format="PNG")
    return content.getvalue()


def write_shards(folder: Path, *shards: Sequence[bytes | None]) -> Index:
    """Shards of encoded images; a sample's class is its place, None stands for a broken one."""
    place, written = locate(str(folder)), []
    for number, images in enumerate(shards):
        entries = [
            Entry(
                f"{number}-{at}",
                {"png": b"broken" if image is None else image, "cls": str(at).encode()},
                [at],
            )
            for at, image in enumerate(images)
        ]
        written.append(write_shard_file(place, f"{number}.tar", entries))
    index = Index("images", SIDE, 1, (1,), "tests", tuple(w.shard for w in written), "")
    return write_index(place, index, {w.shard.name: w.extents for w in written})


def reading(folder: Path, cache: Cache | None = None, **changes: object) -> Reading:
    plain = Reading(locate(str(folder)), "images", SIDE, 1, crop=False, num_classes=10, cache=cache)
    return replace(plain, **changes)  # pyright: ignore[reportArgumentType]


def part(folder: Path, number: int, members: Sequence[int], size: int = 1000) -> Part:
    """Some samples of one block of a shard."""
    extents = sample_extents(locate(f"{folder}/{number}.tar"))
    first = members[0] // size * size
    count = min(size, len(extents) - 1 - first)
    begin, end = extents[first], extents[first + count]
    return Part(f"{number}.tar", begin, end, first, count, tuple(members))


def read(folder: Path, members: Sequence[int], number: int = 0) -> Batch:
    return read_parts(reading(folder), [part(folder, number, members)])


# Blocks.


def test_a_piece_is_read_in_the_order_that_was_planned(tmp_path):
    write_shards(tmp_path, [grey(0)], [grey(10 * n) for n in range(6)])
    batch = read(tmp_path, [4, 0, 5, 2], number=1)
    assert batch.content.shape == (4, SIDE, SIDE, 1)
    assert batch.content.dtype == np.uint8
    assert batch.content[:, 0, 0, 0].tolist() == [40, 0, 50, 20]
    assert batch.labels.tolist() == [4, 0, 5, 2]
    assert batch.keys.tolist() == ["1.tar/1-4", "1.tar/1-0", "1.tar/1-5", "1.tar/1-2"]
    assert batch.broken.tolist() == [""] * 4


@pytest.mark.parametrize("size", SIZES)
def test_blocks_read_one_by_one_are_the_whole_shard_decoded(tmp_path, size):
    index = write_shards(tmp_path, [grey(n) for n in range(6)], [grey(100 + n) for n in range(5)])
    expected: list[tuple[int, bytes, str]] = []
    for shard in index.shards:
        for sample in read_shard(locate(str(tmp_path)), shard):
            out = np.empty((SIDE, SIDE, 1), np.uint8)
            label = decode_sample(sample, 10, False, out)
            expected.append((label, out.tobytes(), f"{shard.name}/{sample.key}"))
    parts = [
        part(tmp_path, number, range(first, min(first + size, shard.count)), size)
        for number, shard in enumerate(index.shards)
        for first in range(0, shard.count, size)
    ]
    batch = read_parts(reading(tmp_path), parts)
    rows = zip(batch.labels, batch.content, batch.keys, strict=True)
    assert [(label, image.tobytes(), key) for label, image, key in rows] == expected


def test_of_nothing_nothing_is_read(tmp_path):
    batch = read_parts(reading(tmp_path), [])
    assert (batch.content.shape, len(batch.labels)) == ((0, SIDE, SIDE, 1), 0)


@some
@given(st.data())
def test_each_sample_is_put_where_its_lane_and_step_want_it(tmp_path, data):
    shards = [[grey(10 * n + m) for m in range(count)] for n, count in enumerate((5, 3, 6))]
    index = write_shards(tmp_path / "shards", *shards)
    lanes, lane_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    stream = Stream(
        seed=data.draw(st.integers(0, 9)),
        counts=(5, 3, 6),
        block_images=data.draw(st.integers(1, 7)),
        batch_size=lanes * lane_size,
        lanes=lanes,
    )
    due = Due(
        stream=stream,
        start=0,
        stop=4 * stream.batch_size,
        window_bytes=1,
        checkpoint=None,
        worker_group="3f9a1c",
        began=0.0,
        noise_stream=0,
        gone_nodes=(),
        index=index,
        reading=reading(tmp_path / "shards"),
    )
    world_size = data.draw(st.integers(1, lanes))
    own = share(lanes, world_size, data.draw(st.integers(0, world_size - 1)))
    rank, start = RankStream(due, own), data.draw(st.integers(0, 3)) * stream.batch_size
    planned = pieces(stream, own, start, due.stop)
    rows = [rank._row(piece, start) for piece in planned]
    found = read_pieces({PIECES: np.array([packed(rows)], object)}, due.reading)
    steps = (due.stop - start) // stream.batch_size
    assert sorted(found["slot"].tolist()) == list(range(steps * len(own) * lane_size))
    window = np.empty(len(found["slot"]), object)
    window[found["slot"]] = found["keys"]
    # Step after step, in each lane after lane, as the plan has them.
    by_lane = {lane: [] for lane in own}
    for piece in planned:
        by_lane[piece.lane] += [f"{piece.shard}.tar/{piece.shard}-{m}" for m in piece.members]
    expected = [
        key
        for step in range(steps)
        for lane in own
        for key in by_lane[lane][step * lane_size : (step + 1) * lane_size]
    ]
    assert window.tolist() == expected
    values = [int(k.split(".")[0]) * 10 + int(k.split("-")[1]) for k in found["keys"]]
    assert found["content"][:, 0, 0, 0].tolist() == values


# Samples that can't be decoded.


@pytest.mark.parametrize(
    ("broken", "members", "read_as"),
    [
        ({2}, [0, 1, 2, 3], [0, 1, 1, 3]),
        ({0}, [3, 0, 2, 1], [3, 1, 2, 1]),
        ({2, 3}, [3, 0, 2, 1], [1, 0, 1, 1]),
        ({0, 1}, [1, 3, 0], [2, 3, 2]),
        ({1, 2, 3}, [3, 1, 2, 0], [0, 0, 0, 0]),
        # A piece may be of one sample.
        ({1}, [1], [0]),
        ({0, 1, 2}, [0], [3]),
    ],
)
def test_the_nearest_good_sample_of_the_block_stands_in_for_a_broken_one(
    tmp_path, broken, members, read_as
):
    write_shards(tmp_path, [None if n in broken else grey(10 * n) for n in range(4)])
    batch = read(tmp_path, members)
    assert batch.labels.tolist() == read_as
    assert batch.content[:, 0, 0, 0].tolist() == [10 * n for n in read_as]
    # The sample keeps its name: it is the one that was trained on, whatever it showed.
    assert batch.keys.tolist() == [f"0.tar/0-{member}" for member in members]
    for member, line in zip(members, batch.broken, strict=True):
        reported = line.startswith(f"0.tar: 0-{member}: not a readable image")
        assert reported if member in broken else line == ""


def test_no_sample_of_another_block_stands_in(tmp_path):
    write_shards(tmp_path, [grey(0), grey(10), None, grey(30)])
    # The second block's first sample is nearer to the first block's last one.
    batch = read_parts(reading(tmp_path), [part(tmp_path, 0, [2], size=2)])
    assert batch.labels.tolist() == [3]


def test_a_block_without_a_good_sample_is_bad_input(tmp_path):
    write_shards(tmp_path, [grey(0)], [grey(0), grey(10), None, None, grey(40)])
    with pytest.raises(BadInput, match=r"none of the samples 2 to 3 of shard 1\.tar can be read"):
        read_parts(reading(tmp_path), [part(tmp_path, 1, [3, 2], size=2)])


def test_a_class_outside_the_models_is_not_replaced(tmp_path):
    write_shards(tmp_path, [grey(0)] * 12)
    with pytest.raises(BadInput, match="class id 11"):
        read(tmp_path, [0, 11])


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_stand_in_is_the_same_after_a_cut(tmp_path, size):
    stream = Stream(seed=0, counts=(6,), block_images=size, batch_size=1, lanes=1)
    broken = member_order(stream, 0, 0)[1]
    write_shards(tmp_path, [None if n == broken else grey(10 * n) for n in range(6)])

    def trained(start: int) -> list[int]:
        due = lane_pieces(stream, 0, start, 6)
        parts = [part(tmp_path, 0, piece.members, size) for piece in due]
        # A block's first sample needn't be the first that is wanted.
        return [n for each in parts for n in read_parts(reading(tmp_path), [each]).labels]

    undisturbed = trained(0)
    assert len(set(undisturbed)) == 5
    assert all(trained(cut) == undisturbed[cut:] for cut in range(1, 6))


# Shards that aren't as indexed.


@pytest.mark.parametrize("count", [1, 3])
def test_a_block_with_another_number_of_samples_than_indexed_is_refused(tmp_path, count):
    write_shards(tmp_path, [grey(0), grey(10), grey(20)])
    wrong = replace(part(tmp_path, 0, [0, 1], size=2), count=count, members=(0,))
    with pytest.raises(BadInput, match=rf"shard 0\.tar holds 2 samples between .*, not {count}"):
        read_parts(reading(tmp_path), [wrong])


@pytest.mark.parametrize(("begin", "end"), [(100, 0), (0, 100), (0, -700), (-3, 0)])
def test_a_block_that_begins_or_ends_elsewhere_is_refused_by_name(tmp_path, begin, end):
    write_shards(tmp_path, [grey(n) for n in range(6)])
    right = part(tmp_path, 0, [2, 3], size=2)
    wrong = replace(right, begin=right.begin + begin, end=right.end + end)
    with pytest.raises(BadInput, match=r"shard 0\.tar (is not a whole tar file|holds)"):
        read_parts(reading(tmp_path), [wrong])


def test_a_shard_that_ends_before_a_block_does_is_refused_by_name(tmp_path):
    write_shards(tmp_path, [grey(n) for n in range(4)])
    wanted = part(tmp_path, 0, [3])
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[: wanted.end - 10])
    with pytest.raises(BadInput, match=r"0\.tar ends at byte"):
        read_parts(reading(tmp_path), [wanted])


def test_a_shard_that_is_not_there_is_refused_by_name(tmp_path):
    write_shards(tmp_path, [grey(0)])
    wanted = part(tmp_path, 0, [0])
    with pytest.raises(BadInput, match=r"1\.tar doesn't exist"):
        read_parts(reading(tmp_path), [replace(wanted, shard="1.tar")])


def test_a_shard_with_another_number_of_samples_than_indexed_is_refused(tmp_path):
    (shard,) = write_shards(tmp_path, [grey(0), grey(10)]).shards
    place = locate(str(tmp_path))
    assert len(read_shard(place, shard)) == 2
    with pytest.raises(BadInput, match=r"shard 0\.tar holds 2 samples, not 3"):
        read_shard(place, replace(shard, count=3))


def test_a_block_beyond_the_end_of_its_shard_is_damage(tmp_path):
    index = write_shards(tmp_path, [grey(0), grey(10)])
    extents = {"0.tar": np.array([0, 1536, 2**60])}
    part_of(index, extents, 1, 0, [0])
    with pytest.raises(
        Damaged, match=r"has a block of shard 0\.tar end at byte 1152921504606846976"
    ):
        part_of(index, extents, 1, 0, [1])


def test_an_older_index_that_counts_other_files_as_samples_is_read_as_it_was(tmp_path):
    members = [("LICENSE", b"text"), ("._0.png", b"mac")]
    members += [
        (f"{n}.{e}", c) for n in range(2) for e, c in (("png", grey(10 * n)), ("cls", b"1"))
    ]
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    # As indexes were before: a sample for each of the four names.
    begins = [0, 1024, 2048, 4096, 6144]
    old = Part("0.tar", begins[0], begins[4], 0, 4, (3, 0, 2))
    batch = read_parts(reading(tmp_path), [old])
    assert batch.keys.tolist() == ["0.tar/1", "0.tar/LICENSE", "0.tar/0"]
    assert [bool(line) for line in batch.broken] == [False, True, False]
    assert batch.content[:, 0, 0, 0].tolist() == [10, 0, 0]
    # And as they are now.
    new = replace(old, begin=2048, count=2, members=(1, 0))
    assert read_parts(reading(tmp_path), [new]).keys.tolist() == ["0.tar/1", "0.tar/0"]


# The cache.


def test_what_was_read_once_is_not_read_from_storage_again(tmp_path):
    write_shards(tmp_path / "shards", [grey(10 * n) for n in range(4)])
    cached = reading(tmp_path / "shards", Cache(str(tmp_path / "cache"), 10**6))
    wanted = part(tmp_path / "shards", 0, [3, 2], size=2)
    first = read_parts(cached, [wanted])
    (tmp_path / "shards" / "0.tar").unlink()
    again = read_parts(cached, [wanted])
    assert np.array_equal(first.content, again.content)
    assert first.labels.tolist() == again.labels.tolist() == [3, 2]


def test_blocks_and_folders_are_kept_apart_in_a_cache(tmp_path):
    cache = Cache(str(tmp_path / "cache"), 10**6)
    for name, value in (("a", 0), ("b", 100)):
        write_shards(tmp_path / name, [grey(value + n) for n in range(4)])
    found = [
        fetch(reading(tmp_path / name, cache), part(tmp_path / name, 0, [at], size=2))
        for _ in range(2)
        for name in ("a", "b")
        for at in (0, 2)
    ]
    assert found[:4] == found[4:]
    assert len(set(found)) == 4


# Packs of latents.

POINTS = 4


def pack(first: int, count: int) -> Pack:
    """Latents whose every number is their place; a class is the place, too."""
    places = np.arange(first, first + count)
    latents = np.broadcast_to(places[:, None, None, None], (count, 8, POINTS, POINTS))
    keys = [f"k{place}" for place in places]
    return Pack(latents.astype(np.float16), places.astype(np.int64), keys)


def write_packs(folder: Path, *counts: int) -> Written:
    entries, first = [], 0
    for number, count in enumerate(counts):
        packed = pack(first, count)
        entries.append(Entry(f"p-{number}", packed.members(), packed.classes.tolist()))
        first += count
    return write_shard_file(locate(str(folder)), "0.tar", entries)


def of_latents(folder: Path) -> Reading:
    return reading(folder, contents="latents", resolution=POINTS, channels=4, num_classes=100)


@pytest.mark.parametrize("members", [(3, 4, 5, 6), (6, 3), (8, 5, 4), (3,)])
def test_latents_are_read_from_packs_in_the_order_that_was_planned(tmp_path, members):
    written = write_packs(tmp_path, 3, 3, 3, 2)
    block = Part("0.tar", written.extents[1], written.extents[3], 3, 6, members)
    batch = read_parts(of_latents(tmp_path), [block])
    assert batch.content.shape == (len(members), 8, POINTS, POINTS)
    assert batch.content.dtype == np.float16
    assert batch.content[:, 7, 0, 3].tolist() == list(members)
    assert batch.labels.tolist() == list(members)
    assert batch.keys.tolist() == [f"0.tar/k{member}" for member in members]
    assert batch.broken.tolist() == [""] * len(members)


def test_a_block_of_packs_with_another_number_of_latents_is_refused(tmp_path):
    written = write_packs(tmp_path, 3, 3)
    block = Part("0.tar", 0, written.extents[1], 0, 6, (0,))
    with pytest.raises(BadInput, match=r"shard 0\.tar holds 3 samples between .*, not 6"):
        read_parts(of_latents(tmp_path), [block])


def test_latents_of_another_shape_are_refused(tmp_path):
    written = write_packs(tmp_path, 3)
    block = Part("0.tar", 0, written.extents[1], 0, 3, (0,))
    with pytest.raises(BadInput, match=r"shard 0\.tar holds latents \(8, 4, 4\), not as indexed"):
        read_parts(replace(of_latents(tmp_path), resolution=8), [block])


def test_a_shard_of_packs_counts_its_latents(tmp_path):
    shard = write_packs(tmp_path, 3, 3, 2).shard
    assert shard.count == 8
    assert len(read_shard(locate(str(tmp_path)), shard)) == 3
    with pytest.raises(BadInput, match=r"shard 0\.tar holds 8 samples, not 3"):
        read_shard(locate(str(tmp_path)), replace(shard, count=3))


# How a job reads.

JOB = """
run: {folder: somewhere, total_images: 64}
data: {shards: elsewhere, num_classes: 7}
storage: {retry_seconds: 3}
model:
  channels: 4
  resolution: 32
  generator: {size: {depth: 4, width: 32, heads: 2}, patch: 4}
  discriminator: {size: {depth: 2, width: 32, heads: 2}, patch: 4}
optimisation: {batch_size: 16, lanes: 4}
"""


def job(*changes: str) -> Config:
    return parse(JOB, "job", changes)


IMAGES = Index("images", 256, 3, (1,), "", (Shard("0.tar", 1, 1, ""),), "")
LATENTS = replace(
    IMAGES, contents="latents", resolution=32, channels=4, made_with={"scaling_factor": 0.25}
)


@pytest.mark.parametrize(
    ("index", "changes", "shape", "number_bytes"),
    [
        (IMAGES, ["model.channels=3"], (32, 32, 3), 1),
        # The VAE is to encode pixels, eight times as many a side.
        (IMAGES, ["latents.vae=a-vae"], (256, 256, 3), 1),
        (LATENTS, [], (8, 32, 32), 2),
        (LATENTS, ["latents.vae=a-vae"], (8, 32, 32), 2),
    ],
)
def test_a_job_reads_images_latents_or_what_its_vae_encodes(index, changes, shape, number_bytes):
    found = reading_of(job(*changes), index, locate("shards"))
    assert found.shape() == shape
    assert found.sample_bytes() == shape[0] * shape[1] * shape[2] * number_bytes
    assert (found.num_classes, found.cache) == (7, None)
    assert found.scaling_factor == (0.25 if index is LATENTS else 1.0)
    # Images of another size than the job asks for are reduced.
    assert found.crop is (index is IMAGES and found.resolution != index.resolution)


def test_images_of_various_sizes_are_cropped():
    assert reading_of(job(), replace(IMAGES, resolution=None), locate("shards")).crop


def test_a_job_with_a_cache_folder_has_a_cache():
    config = job("data.cache_folder=/scratch/cache", "data.cache_gigabytes=2.5")
    found = reading_of(config, IMAGES, locate("shards"))
    assert found.cache == Cache("/scratch/cache", 2_500_000_000)


# Whole sets.


def labels_read(folder: Location, index: Index, limit: int) -> list[int]:
    assert folder.local_path is not None
    images, labels = read_images(reading(folder.local_path), index, limit)
    assert images.shape == (len(labels), SIDE, SIDE, 1)
    assert images[:, 0, 0, 0].tolist() == [10 * n for n in labels]
    return labels.tolist()


@pytest.mark.parametrize(
    ("limit", "expected"), [(2, [0, 2]), (3, [0, 2, 1]), (4, [0, 2, 1, 2]), (99, [0, 2, 1, 2])]
)
def test_a_whole_set_is_read_in_order_without_its_broken_samples(tmp_path, limit, expected):
    shards = [[grey(0), None, grey(20)], [None, grey(10), grey(20)]]
    index = write_shards(tmp_path, *shards)
    assert labels_read(locate(str(tmp_path)), index, limit) == expected


def test_no_shard_is_opened_once_there_are_images_enough(tmp_path):
    index = write_shards(tmp_path, [grey(0), grey(10)], [grey(0)])
    (tmp_path / "1.tar").unlink()
    assert labels_read(locate(str(tmp_path)), index, 2) == [0, 1]


def test_a_shard_need_not_have_been_written_here(tmp_path):
    write_shards(tmp_path, [grey(10 * n) for n in range(4)])
    with (
        tarfile.open(tmp_path / "0.tar") as archive,
        tarfile.open(tmp_path / "1.tar", "w", format=tarfile.PAX_FORMAT) as other,
    ):
        for info in archive:
            info.name, info.mtime = "n" * 120 + info.name, 1.5
            other.addfile(info, archive.extractfile(info))
    batch = read_parts(reading(tmp_path), [part(tmp_path, 1, [3, 2], size=2)])
    assert batch.content[:, 0, 0, 0].tolist() == [30, 20]
