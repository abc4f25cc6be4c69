"""One shard of a preparation: samples in the planned order, those that can't be used told."""

import io

import numpy as np
import pytest
from PIL import Image

from cat_ray.data import shard_task as module
from cat_ray.data.encoder import Encodings
from cat_ray.data.packs import unpack
from cat_ray.data.preparation import Output
from cat_ray.data.shard_plan import plan_shards
from cat_ray.data.shard_task import image_entries, latent_entries, read_plan
from cat_ray.data.sources import Encoded, Source, Unit
from cat_ray.data.tar import RawSample
from cat_ray.errors import BadInput, StorageDown
from cat_ray.storage import locate


def picture(value: int, side: int = 16, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (side, side + 4), (value, 0, 9)).save(content, format=kind)
    return content.getvalue()


def sample(number: int, **changes: object) -> Encoded:
    values = {"key": f"k{number}", "label": number % 3, "content": picture(number), **changes}
    return Encoded(**values)  # pyright: ignore[reportArgumentType]


UNUSABLE = [
    (sample(1, content=b""), "k1: it has no image, or no class"),
    (sample(1, label=-1), "k1: it has no class"),
    (sample(1, content=b"text"), "k1: not a readable image"),
    (sample(1, content=picture(1)[:60]), "k1: not a readable image"),
]


@pytest.mark.parametrize("encoding", ["png", "jpeg", "original"])
@pytest.mark.parametrize(("bad", "told"), UNUSABLE)
def test_a_sample_that_cannot_be_used_is_told_and_left_out(encoding, bad, told):
    broken: list[str] = []
    output = Output(folder="f", resolution=8, encoding=encoding)
    found = list(image_entries(iter([sample(0), bad, sample(2)]), output, broken.append))
    assert [(entry.key, entry.labels) for entry in found] == [("k0", [0]), ("k2", [2])]
    assert len(broken) == 1
    assert broken[0].startswith(told)


@pytest.mark.parametrize(("kind", "ending"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_an_original_file_keeps_its_bytes_under_the_ending_that_it_has(kind, ending):
    content, broken = picture(7, kind=kind), []
    output = Output(folder="f", encoding="original")
    (entry,) = image_entries(iter([sample(1, content=content)]), output, broken.append)
    assert entry.members == {ending: content, "cls": b"1"}


def test_an_original_file_of_a_kind_that_is_not_read_is_told():
    broken: list[str] = []
    output = Output(folder="f", encoding="original")
    given = iter([sample(1, content=picture(1, kind="GIF"))])
    assert list(image_entries(given, output, broken.append)) == []
    assert broken == ["k1: a GIF file, not one of JPEG, PNG, WEBP"]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 25])
def test_latents_come_in_packs_each_with_its_own_samples(count):
    broken: list[str] = []
    output = Output(folder="f", contents="latents", resolution=8, pack_images=3, tokens=True)

    def encode(pixels: np.ndarray):
        # The red of the first pixel stands for the latent.
        assert pixels.shape[1:] == (8, 8, 3)
        values = pixels[:, 0, 0, 0].astype(np.float16)
        latents = np.broadcast_to(values[:, None, None, None], (len(values), 8, 1, 1))
        return lambda: Encodings(latents, values[:, None, None])

    given = [sample(number) for number in range(count)]
    bad, _ = UNUSABLE[2]
    entries = list(
        latent_entries(iter([*given[:2], bad, *given[2:]]), output, broken.append, encode, "t")
    )
    packs = [unpack(RawSample(e.key, dict(e.members)), "t.tar") for e in entries]
    assert [entry.key for entry in entries] == [f"t-{n:06d}" for n in range(-(-count // 3))]
    # All are full but the last: a block's place is computed from that.
    assert [len(pack.keys) for pack in packs][:-1] == [3] * (len(packs) - 1)
    for entry, pack in zip(entries, packs, strict=True):
        numbers = [int(key.removeprefix("k")) for key in pack.keys]
        assert pack.latents[:, 0, 0, 0].tolist() == numbers
        assert pack.tokens is not None
        assert pack.tokens[:, 0, 0].tolist() == numbers
        assert pack.classes.tolist() == list(entry.labels) == [n % 3 for n in numbers]
    assert [key for pack in packs for key in pack.keys] == [f"k{n}" for n in range(count)]
    assert len(broken) == 1


@pytest.mark.parametrize("counts", [[1] * 200, [7] * 30, [100, 1, 50]])
def test_a_shard_is_read_in_its_planned_order(monkeypatch, counts):
    units = [Unit(f"{n}", 0, 1, count) for n, count in enumerate(counts)]

    def read_unit(_: Source, unit: Unit) -> list[Encoded]:
        return [Encoded(f"{unit.file}-{place}", 0, b"x") for place in range(unit.count)]

    monkeypatch.setattr(module, "read_unit", read_unit)
    source = Source("webdataset", locate("."))
    for plan in plan_shards(units, 70, seed=1):
        expected = []
        for number, group in enumerate(plan.groups):
            keys = [f"{t.unit.file}-{place}" for t in group for place in range(t.first, t.stop)]
            expected += [keys[place] for place in plan.order(number)]
        assert [found.key for found in read_plan(source, plan)] == expected


@pytest.mark.parametrize("error", [BadInput, StorageDown])
def test_a_unit_that_cannot_be_read_ends_the_shard_with_its_error(monkeypatch, error):
    def read_unit(*_: object) -> list[Encoded]:
        raise error("the storage said no")

    monkeypatch.setattr(module, "read_unit", read_unit)
    (plan,) = plan_shards([Unit("a", 0, 1, 1)], 10, seed=0)
    with pytest.raises(error, match="said no"):
        list(read_plan(Source("webdataset", locate(".")), plan))
