"""Pictures of samples: each a function of checkpoint, seed, class and column."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cat_ray.config import parse
from cat_ray.errors import BadInput
from cat_ray.evaluation.grid import GAP, grid, stage_grid, to_image, to_png
from cat_ray.evaluation.pictures import write_pictures
from cat_ray.evaluation.sampling import (
    SAMPLING_BATCH,
    Truncation,
    class_labels,
    class_means,
    latents,
    sample_stages,
    to_pixels,
    to_unit,
)
from cat_ray.model.build import build_generator
from cat_ray.storage import locate

SIDE = 32


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Files.


def test_a_grid_and_a_picture_for_each_class_and_column_are_written(checkpoint, tmp_path):
    out = tmp_path / "out"
    assert write_pictures(checkpoint, locate(str(out)), [3, 7], 4, seed=5, decay=None) == 8
    singles = [f"class-{c:04d}-seed-5-{n:03d}.png" for c in (3, 7) for n in range(4)]
    assert sorted(content(out)) == sorted([*singles, "grid.png"])
    canvas = opened(out / "grid.png")
    assert canvas.shape == (2 * SIDE, 4 * SIDE)
    for place, name in enumerate(singles):
        row, column = divmod(place, 4)
        tile = canvas[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
        assert np.array_equal(opened(out / name), tile)
    assert len({path.read_bytes() for path in map(out.joinpath, singles)}) == 8


def test_without_classes_there_is_a_row_for_each(checkpoint, tmp_path):
    out = tmp_path / "out"
    assert write_pictures(checkpoint, locate(str(out)), None, 1, seed=0, decay=None) == 10
    assert opened(out / "grid.png").shape == (10 * SIDE, SIDE)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(checkpoint, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        torch.manual_seed(seed + len(name))
        write_pictures(checkpoint, locate(str(tmp_path / name)), [1], 2, seed, None)
    assert content(tmp_path / "one") == content(tmp_path / "again")
    assert opened(tmp_path / "one" / "grid.png").tobytes() != (
        opened(tmp_path / "other" / "grid.png").tobytes()
    )


def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(checkpoint, tmp_path):
    for name, classes, count in (("alone", [7], 1), ("many", [3, 7], 3)):
        write_pictures(checkpoint, locate(str(tmp_path / name)), classes, count, 0, None)
    picture = "class-0007-seed-0-000.png"
    alone, many = (opened(tmp_path / name / picture).astype(int) for name in ("alone", "many"))
    # In another batch a sum may be rounded another way.
    assert np.abs(alone - many).max() <= 1


@pytest.mark.parametrize(("decay", "same"), [(0.9, True), (0.5, False), (0.0, False)])
def test_the_first_average_is_drawn_unless_another_is_named(checkpoint, tmp_path, decay, same):
    for name, chosen in (("default", None), ("named", decay)):
        write_pictures(checkpoint, locate(str(tmp_path / name)), [1], 1, 0, chosen)
    assert (content(tmp_path / "default") == content(tmp_path / "named")) is same


@pytest.mark.parametrize(("classes", "outside"), [([10], 10), ([3, -1], -1), ([0, 12, 11], 12)])
def test_a_class_that_does_not_exist_is_refused_before_anything_is_written(
    checkpoint, tmp_path, classes, outside
):
    with pytest.raises(BadInput, match=f"class {outside} doesn't exist: there are 0 to 9"):
        write_pictures(checkpoint, locate(str(tmp_path / "out")), classes, 1, 0, None)
    assert not (tmp_path / "out").exists()


def test_more_pictures_than_memory_holds_are_left_to_a_job(checkpoint, tmp_path):
    with pytest.raises(BadInput, match=r"20,000 pictures are more than 10,000: a job, such as"):
        write_pictures(checkpoint, locate(str(tmp_path / "out")), [0], 20_000, 0, None)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused_and_left_alone(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "holiday.png").write_bytes(b"mine")
    with pytest.raises(BadInput, match="isn't empty: choose another --out"):
        write_pictures(checkpoint, locate(str(out)), [1], 1, 0, None)
    assert content(out) == {"holiday.png": b"mine"}


def test_full_truncation_leaves_one_picture_for_each_class(checkpoint, tmp_path):
    for strength in (0.0, 0.5, 1.0):
        write_pictures(checkpoint, locate(f"{tmp_path}/{strength}"), [1, 2], 3, 0, None, strength)
    first, second = (
        [opened(tmp_path / "1.0" / f"class-000{label}-seed-0-{n:03d}.png") for n in range(3)]
        for label in (1, 2)
    )
    assert all(np.array_equal(picture, first[0]) for picture in first)
    assert not np.array_equal(first[0], second[0])
    grids = [opened(tmp_path / str(strength) / "grid.png") for strength in (0.0, 0.5, 1.0)]
    assert not np.array_equal(grids[0], grids[1]) and not np.array_equal(grids[1], grids[2])


# Samples.


def test_a_latent_is_a_function_of_seed_and_index():
    together = latents(3, range(5), 8)
    assert torch.equal(latents(3, [4, 2], 8), together[[4, 2]])
    assert (
        len({tuple(row) for row in torch.cat([together, latents(4, range(5), 8)]).tolist()}) == 10
    )


@pytest.mark.parametrize("rule", ["uniform", "balanced"])
def test_a_class_is_a_function_of_seed_and_index(rule):
    together = class_labels(rule, 3, range(2000), 7)
    assert together.dtype == torch.int64
    assert torch.equal(class_labels(rule, 3, [4, 2, 1999], 7), together[[4, 2, 1999]])
    counts = torch.bincount(together, minlength=7)
    assert len(counts) == 7
    # Seven standard deviations at most, and not the very same number of each.
    assert (counts - 2000 / 7).abs().max() < (1 if rule == "balanced" else 110)
    assert rule == "balanced" or counts.max() - counts.min() > 1


def test_another_seed_gives_other_classes_by_chance_but_not_when_balanced():
    for rule, same in (("uniform", False), ("balanced", True)):
        one, other = (class_labels(rule, seed, range(100), 10) for seed in (0, 1))
        assert torch.equal(one, other) is same


def test_truncation_draws_styles_to_the_mean_of_their_own_class(tiny_job):
    generator = build_generator(parse(tiny_job, "job")).eval()
    device = torch.device("cpu")
    means = class_means(generator, device)
    assert torch.equal(means, class_means(generator, device))
    z, labels = latents(0, range(600), generator.shape.latent_width), torch.arange(600) % 10
    w = generator.mapped(z, labels)
    # The means are those of other latents than the samples'.
    own = torch.stack([w[labels == label].mean(dim=0) for label in range(10)])
    deviation = torch.stack([w[labels == label].std(dim=0) for label in range(10)])
    assert ((means - own).abs() <= 6 * deviation / 60**0.5 + 1e-6).all()

    for strength in (0.0, 0.3, 1.0):
        drawn = Truncation(strength, means).applied(w, labels)
        torch.testing.assert_close(drawn, w + strength * (means[labels] - w))
    untouched = sample_stages(generator, z, labels, device, Truncation(0.0, means))
    assert torch.equal(untouched, sample_stages(generator, z, labels, device))


def test_samples_keep_their_order_through_batches():
    class Echo(nn.Module):
        def forward(self, z: Tensor, labels: Tensor) -> Tensor:
            assert len(z) <= SAMPLING_BATCH
            return torch.stack([z[:, :1], labels[:, None].float()])[..., None, None]

    count = 2 * SAMPLING_BATCH + 3
    z, labels = torch.arange(count).float()[:, None], torch.arange(count).flip(0)
    outputs = sample_stages(Echo(), z, labels, torch.device("cpu"))
    assert outputs.shape == (2, count, 1, 1, 1)
    assert torch.equal(outputs[0].flatten(), z.flatten())
    assert torch.equal(outputs[1].flatten(), labels.float())


def test_sampling_builds_no_graph():
    network = nn.Sequential(nn.Linear(2, 3), nn.Unflatten(1, (1, 1, 3)))

    class Stages(nn.Module):
        def forward(self, z: Tensor, _: Tensor) -> Tensor:
            return network(z)[None]

    outputs = sample_stages(Stages(), torch.ones(2, 2), torch.zeros(2).long(), torch.device("cpu"))
    assert not outputs.requires_grad


@pytest.mark.parametrize(
    ("value", "pixel"),
    [
        (-9.0, 0),
        (-1.0, 0),
        (-0.997, 0),
        (-0.995, 1),
        (0.0, 128),
        (0.995, 254),
        (1.0, 255),
        (9, 255),
    ],
)
def test_a_value_is_rounded_to_the_nearest_pixel_and_clamped(value, pixel):
    assert to_pixels(torch.tensor([value])).tolist() == [pixel]


def test_pixels_survive_the_way_to_values_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_unit(pixels)), pixels)
    assert (to_unit(pixels).min(), to_unit(pixels).max()) == (-1, 1)


# Grids.


@pytest.mark.parametrize(("count", "columns", "rows"), [(6, 3, 2), (5, 3, 2), (2, 3, 1), (1, 1, 1)])
def test_a_grid_fills_row_after_row_and_leaves_the_rest_black(count, columns, rows):
    images = torch.arange(1, count + 1, dtype=torch.uint8).view(count, 1, 1, 1)
    images = images.expand(-1, 3, 2, 2)
    canvas = grid(images, columns)
    assert canvas.shape == (3, rows * 2, columns * 2)
    expected = [*range(1, count + 1), *[0] * (rows * columns - count)]
    for channel in canvas:
        assert channel[::2, ::2].flatten().tolist() == expected
        assert channel[1::2, 1::2].flatten().tolist() == expected


def test_a_picture_in_a_grid_is_not_turned():
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    assert torch.equal(grid(image, 1), image[0])


def test_stages_stand_side_by_side_coarse_first_with_a_white_gap():
    values = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1, 1)
    canvas = np.asarray(stage_grid(values.expand(3, 4, 1, 2, 2), columns=2))
    assert canvas.shape == (4, 3 * 4 + 2 * GAP)
    for stage, pixel in enumerate((0, 128, 255)):
        left = stage * (4 + GAP)
        assert (canvas[:, left : left + 4] == pixel).all()
        assert (canvas[:, left + 4 : left + 4 + GAP] == 255).all()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "L")])
def test_a_png_holds_the_pixels(channels, mode):
    pixels = torch.arange(channels * 6, dtype=torch.uint8).view(channels, 2, 3)
    with Image.open(io.BytesIO(to_png(to_image(pixels)))) as image:
        assert (image.format, image.mode, image.size) == ("PNG", mode, (3, 2))
        shown = pixels.permute(1, 2, 0).numpy() if channels == 3 else pixels[0].numpy()
        assert np.array_equal(np.asarray(image), shown)
