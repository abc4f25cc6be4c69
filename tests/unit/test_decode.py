"""From a shard's bytes to samples, and what becomes of those that can't be read."""

import contextlib
import gzip
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cat_ray.data.decode import BrokenSample, RawSample, decode_image, decode_sample, untar
from cat_ray.data.index import Index, Shard
from cat_ray.data.order import Stream, lane_pieces, member_order
from cat_ray.data.read import read_images, read_shard
from cat_ray.data.stream import Due, read_piece
from cat_ray.errors import BadInput
from cat_ray.storage import Location, locate

SIDE = 8
few = settings(max_examples=40, deadline=None, derandomize=True)

Members = Sequence[tuple[str, bytes]]


def tar(members: Members) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def encode(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    content = io.BytesIO()
    image.save(content, format=kind, **options)
    return content.getvalue()


def grey(value: int, side: int = SIDE) -> bytes:
    return encode(Image.new("L", (side, side), value))


def picture() -> np.ndarray:
    """A smooth RGB image that is no two ways symmetric, `[SIDE, SIDE, 3]`."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return np.stack([30 * rows, 20 * columns, 10 * rows + 15 * columns], axis=2).astype(np.uint8)


def luminance(pixels: np.ndarray) -> np.ndarray:
    return pixels @ [0.299, 0.587, 0.114]


# Splitting a shard into samples.


@few
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["png", "cls", "seg.png", "json"]), st.binary(max_size=700), min_size=1
        ),
        max_size=6,
    )
)
def test_members_that_share_a_name_are_a_sample(samples):
    members = [(f"a/{n:03d}.{e}", data) for n, s in enumerate(samples) for e, data in s.items()]
    expected = [RawSample(f"a/{n:03d}", sample) for n, sample in enumerate(samples)]
    assert list(untar(tar(members), "shard")) == expected


def test_a_sample_is_told_by_its_folder_too_and_endings_are_lower_case():
    members = [("a/0.PNG", b"1"), ("b/0.png", b"2"), ("0.Cls", b"3")]
    assert list(untar(tar(members), "shard")) == [
        RawSample("a/0", {"png": b"1"}),
        RawSample("b/0", {"png": b"2"}),
        RawSample("0", {"cls": b"3"}),
    ]


def test_what_is_no_file_is_no_member():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE):
            entry = tarfile.TarInfo("0.png")
            entry.type = kind
            archive.addfile(entry)
    assert list(untar(content.getvalue(), "shard")) == []


WHOLE = tar([("0.png", b"p" * 600), ("0.cls", b"1"), ("1.png", b"p" * 600), ("1.cls", b"2")])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no tar at all",
        b"\0" * 100,
        grey(0),
        gzip.compress(WHOLE),
        WHOLE[:300],
        WHOLE[:512],
        WHOLE[:900],
        WHOLE[:1100],
        WHOLE[:2048],
        WHOLE[:3100],
        WHOLE[:2560],
        WHOLE[:2800],
        WHOLE[:2560] + b"garbage!" * 64 + WHOLE[3072:],
    ],
)
def test_a_shard_that_is_no_whole_tar_is_refused_by_name(content):
    with pytest.raises(BadInput, match=r"shard seven\.tar is not a whole tar file"):
        list(untar(content, "seven.tar"))


def test_a_shard_with_another_number_of_samples_than_indexed_is_refused(tmp_path):
    (tmp_path / "s.tar").write_bytes(WHOLE)
    place = locate(str(tmp_path))
    assert len(read_shard(place, Shard("s.tar", 2, len(WHOLE), ""))) == 2
    with pytest.raises(BadInput, match=r"shard s\.tar holds 2 samples, not 3"):
        read_shard(place, Shard("s.tar", 3, len(WHOLE), ""))


# Decoding an image.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_a_png_is_decoded_exactly_whatever_its_mode(mode, channels):
    pixels = picture()
    if mode == "L":
        pixels[:] = pixels[:, :, :1]
    # 64 pixels fit a palette of 256 colours without loss.
    image = Image.fromarray(pixels)
    image = image.quantize(256, dither=Image.Dither.NONE) if mode == "P" else image.convert(mode)
    expected = np.asarray(image.convert("RGB")) if mode == "P" else pixels
    assert np.abs(expected.astype(int) - pixels).max() <= 2
    decoded = decode_image(encode(image), channels, SIDE)
    assert (decoded.shape, decoded.dtype) == ((channels, SIDE, SIDE), np.uint8)
    if channels == 3:
        assert np.array_equal(decoded, expected.transpose(2, 0, 1))
    else:
        assert np.abs(decoded[0] - luminance(expected)).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_is_decoded_closely_whatever_its_mode(mode, channels):
    image = Image.fromarray(picture()).convert(mode)
    decoded = decode_image(encode(image, "JPEG", quality=100, subsampling=0), channels, SIDE)
    assert (decoded.shape, decoded.dtype) == ((channels, SIDE, SIDE), np.uint8)
    expected = np.asarray(image.convert("RGB"))
    if channels == 3:
        assert np.abs(decoded.transpose(1, 2, 0).astype(int) - expected).max() <= 6
    else:
        assert np.abs(decoded[0] - luminance(expected)).max() <= 6


# Noise, so that no byte is there in vain.
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
PNG, JPEG = encode(NOISE), encode(NOISE, "JPEG")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"text",
        PNG[: len(PNG) // 2],
        PNG[:-40],
        PNG[:40] + b"\0" * 8 + PNG[48:],
        JPEG[: len(JPEG) // 2],
        JPEG[:4],
        # A frame header that claims 65,280 x 65,280 pixels.
        JPEG.replace(b"\xff\xc0\0\x11\x08\0\x08\0\x08", b"\xff\xc0\0\x11\x08\xff\0\xff\0"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_that_are_no_whole_image_are_a_broken_sample(content, channels):
    with pytest.raises(BrokenSample, match="not a readable image"):
        decode_image(content, channels, SIDE)


@few
@given(st.sampled_from([PNG, JPEG]), st.data())
def test_damage_gives_a_picture_or_a_broken_sample_and_nothing_else(content, data):
    at = data.draw(st.integers(0, 150))
    damaged = content[:at] + data.draw(st.binary(max_size=6)) + content[at + 3 :]
    with contextlib.suppress(BrokenSample):
        assert decode_image(damaged, 3, SIDE).shape == (3, SIDE, SIDE)


@pytest.mark.parametrize(("width", "height"), [(8, 9), (9, 8), (16, 16), (4, 4)])
def test_an_image_of_another_size_is_a_broken_sample(width, height):
    content = encode(Image.new("RGB", (width, height)))
    with pytest.raises(BrokenSample, match=f"{width} x {height}, not 8 x 8"):
        decode_image(content, 3, SIDE)


# Decoding a sample.


@pytest.mark.parametrize("ending", ["png", "jpg", "jpeg", "webp"])
@pytest.mark.parametrize(("written", "label"), [(b"0", 0), (b"9", 9), (b" 3\n", 3)])
def test_a_sample_is_its_image_and_its_class(ending, written, label):
    kind = {"png": "PNG", "webp": "WEBP"}.get(ending, "JPEG")
    members = {ending: encode(Image.new("L", (SIDE, SIDE), 100), kind), "cls": written}
    image, found = decode_sample(RawSample("k", members), 1, SIDE, 10)
    assert found == label
    assert np.abs(image.astype(int) - 100).max() <= 1


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"cls": b"1"}, "needs an image"),
        ({"png": PNG}, r"a \.cls member"),
        ({"txt": b"x", "cls": b"1"}, "needs an image"),
        ({"png": PNG, "cls": b"cat"}, "not a number"),
        ({"png": PNG, "cls": b""}, "not a number"),
        ({"png": PNG, "cls": b"\xff"}, "not a number"),
        ({"png": b"", "cls": b"1"}, "not a readable image"),
    ],
)
def test_a_sample_without_image_or_class_is_broken(members, told):
    with pytest.raises(BrokenSample, match=told):
        decode_sample(RawSample("k", members), 3, SIDE, 10)


@pytest.mark.parametrize("label", [10, 11, -1, 10**12])
def test_a_class_outside_the_models_is_bad_input_and_no_broken_sample(label):
    # To skip such samples would hide that the whole configuration is wrong.
    sample = RawSample("cat7", {"png": PNG, "cls": str(label).encode()})
    with pytest.raises(BadInput, match=rf"cat7 has class id {label}, outside data\.num_classes 10"):
        decode_sample(sample, 3, SIDE, 10)


# Reading pieces and whole sets.


def write_shards(folder: Path, *shards: Sequence[bytes | None]) -> Index:
    """Shards of encoded images; a sample's class is its place, None stands for a broken one."""
    records = []
    for number, images in enumerate(shards):
        members: list[tuple[str, bytes]] = []
        for place, image in enumerate(images):
            members.append((f"{number}-{place}.png", b"broken" if image is None else image))
            members.append((f"{number}-{place}.cls", str(place).encode()))
        content = tar(members)
        (folder / f"{number}.tar").write_bytes(content)
        records.append(Shard(f"{number}.tar", len(images), len(content), ""))
    return Index(SIDE, 1, (1,), "tests", tuple(records))


def read(folder: Path, index: Index, members: Sequence[int], shard: int = 0) -> dict:
    """A piece as a lane's samples from the hundredth on."""
    due = Due(
        stream=Stream(seed=0, counts=(1,), batch_size=1, lanes=1),
        start=0,
        stop=1,
        window=1,
        checkpoint=None,
        worker_group="3f9a1c",
        began=0.0,
        noise_stream=0,
        gone_nodes=(),
        index=index,
        folder=locate(str(folder)),
        num_classes=10,
    )
    task = {"lane": 5, "start": 100, "shard": shard, "members": members}
    return read_piece({name: np.asarray([value]) for name, value in task.items()}, due)


def test_a_piece_is_read_in_the_order_that_was_planned(tmp_path):
    index = write_shards(tmp_path, [grey(0)], [grey(10 * n) for n in range(6)])
    piece = read(tmp_path, index, [4, 0, 5, 2], shard=1)
    assert piece["image"].shape == (4, 1, SIDE, SIDE)
    assert piece["image"].dtype == np.uint8
    assert piece["image"][:, 0, 0, 0].tolist() == [40, 0, 50, 20]
    assert piece["label"].tolist() == [4, 0, 5, 2]
    assert piece["lane"].tolist() == [5] * 4
    assert piece["place"].tolist() == [100, 101, 102, 103]
    assert piece["broken"].tolist() == [""] * 4


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
def test_the_nearest_good_sample_of_the_shard_stands_in_for_a_broken_one(
    tmp_path, broken, members, read_as
):
    index = write_shards(tmp_path, [None if n in broken else grey(10 * n) for n in range(4)])
    piece = read(tmp_path, index, members)
    assert piece["label"].tolist() == read_as
    assert piece["image"][:, 0, 0, 0].tolist() == [10 * n for n in read_as]
    for member, line in zip(members, piece["broken"], strict=True):
        reported = line.startswith(f"0.tar: 0-{member}: not a readable image")
        assert reported if member in broken else line == ""


def test_a_shard_without_a_good_sample_is_bad_input(tmp_path):
    index = write_shards(tmp_path, [grey(0)], [None, None, None])
    with pytest.raises(BadInput, match=r"no sample of shard 1\.tar can be read"):
        read(tmp_path, index, [2, 1], shard=1)


def test_a_class_outside_the_models_is_not_replaced(tmp_path):
    index = write_shards(tmp_path, [grey(0)] * 12)
    with pytest.raises(BadInput, match="class id 11"):
        read(tmp_path, index, [0, 11])


def test_a_stand_in_is_the_same_after_a_cut(tmp_path):
    stream = Stream(seed=0, counts=(6,), batch_size=1, lanes=1)
    broken = member_order(stream, 0, 0)[2]
    index = write_shards(tmp_path, [None if n == broken else grey(10 * n) for n in range(6)])

    def trained(start: int) -> list[int]:
        due = lane_pieces(stream, 0, start, 6)
        return [n for piece in due for n in read(tmp_path, index, piece.members)["label"]]

    undisturbed = trained(0)
    assert all(trained(cut) == undisturbed[cut:] for cut in range(1, 6))


def labels_read(folder: Location, index: Index, limit: int) -> list[int]:
    images, labels = read_images(folder, index, num_classes=10, limit=limit)
    assert images.shape == (len(labels), 1, SIDE, SIDE)
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
