"""The jobs in jobs/: each resolves, builds its models, says what it costs, and fits the others."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cat_ray.config import Config, dump, load, parse
from cat_ray.data.latent_shape import REDUCTION
from cat_ray.data.preparation import Preparation
from cat_ray.evaluation.measurement import Measurement, Sampling
from cat_ray.model.build import build_discriminator, build_generator
from cat_ray.model.discriminator import Discriminator
from cat_ray.model.generator import Generator
from cat_ray.section import Section
from cat_ray.training.beginning import rules_between

JOBS = Path(__file__).parents[2] / "jobs"
KINDS = {"train": Config, "prepare": Preparation, "fid": Measurement, "sample": Sampling}
NAMES = sorted(path.stem for path in JOBS.glob("*.yaml"))
CAT = ("cat_b2_256", "cat_m2_256", "cat_h2_256", "cat_h2_512", "cat_h2_1024")
IMAGENET = 1_281_167
# Dense bf16, of the H100 SXM's data sheet.
PEAK_FLOPS = 989e12


def path(name: str) -> Path:
    return JOBS / f"{name}.yaml"


def first_comment(name: str) -> str:
    lines = path(name).read_text().splitlines()
    comment = lines[: next(at for at, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(line.removeprefix("#") for line in comment)


def prose(name: str) -> str:
    return " ".join(first_comment(name).split())


def continued(words: list[str]) -> list[str]:
    """The job's values that a command sets, `--initialise-from` among them."""
    given = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    began = [words[at + 1] for at, word in enumerate(words) if word == "--initialise-from"]
    return [*given, *(f"run.initialise_from={uri}" for uri in began)]


def commands(name: str) -> Iterator[list[str]]:
    """The commands in a job's first comment, and lists of options for its own, as words."""
    code = re.findall(r"(?:^ {5,}\S.*\n?)+", first_comment(name), re.MULTILINE)
    for block in code:
        yield shlex.split(block.replace("\\\n", " "))


def command_of(name: str) -> str:
    own = [words[1] for words in commands(name) if words[:1] == ["cat-ray"]]
    # A bench is of a training job.
    return "train" if own[0] == "bench" else own[0]


def training(name: str) -> Config:
    return load(str(path(name)))


@cache
def on_meta(name: str) -> tuple[Generator, Discriminator]:
    with torch.device("meta"):
        return build_generator(training(name)), build_discriminator(training(name))


def judged(name: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    model = training(name).model
    sides = model.scales()
    images = [torch.empty(1, model.channels, side, side, device="meta") for side in sides]
    return images, torch.empty(1, dtype=torch.long, device="meta")


def gmac(network: nn.Module, *inputs: object) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", NAMES)
def test_a_job_resolves_with_every_command_that_its_first_comment_gives(name: str) -> None:
    given = list(commands(name))
    own = [words for words in given if words[0] == "cat-ray" and f"jobs/{name}.yaml" in words]
    assert own, "its first comment names no command for it"
    for words in given:
        kind, file = command_of(name), path(name)
        if words[0] == "cat-ray":
            at = next(place for place, word in enumerate(words) if word.endswith(".yaml"))
            kind, file = (
                command_of(name) if words[1] == "bench" else words[1],
                JOBS.parent / words[at],
            )
        found: Section = load(str(file), continued(words), KINDS[kind])
        assert isinstance(found, KINDS[kind])
        assert parse(dump(found), name, (), KINDS[kind]) == found


@pytest.mark.parametrize("name", NAMES)
def test_the_first_comment_of_a_job_says_what_it_costs(name: str) -> None:
    told = re.search(r"Costs, (estimated|measured): [^.]*\d[^.]*", prose(name))
    assert told, prose(name)
    assert "$" in prose(name) or "no GPU" in prose(name)


@pytest.mark.parametrize("name", [name for name in NAMES if command_of(name) == "train"])
@torch.no_grad()
def test_the_models_of_a_training_job_can_be_built_and_run(name: str) -> None:
    generator, discriminator = on_meta(name)
    model = training(name).model
    images, labels = judged(name)
    z = torch.empty(1, model.generator.latent_width, device="meta")
    side = model.resolution
    assert generator(z, labels).shape == (model.stages, 1, model.channels, side, side)
    assert discriminator(images, labels, 0)[0].shape == (1, model.stages)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("cat_b2_256", 133.3),
        ("cat_m2_256", 260.9),
        ("cat_h2_256", 959.8),
        ("cat_h2_512", 960.7),
        ("cat_h2_1024", 961.0),
    ],
)
def test_the_networks_have_the_published_parameters(name: str, millions: float) -> None:
    generator, discriminator = on_meta(name)
    # The publication counts the fixed positions too, of which 512 px has four times as many, and a
    # patch embedding without effect that ours doesn't have.
    count = sum(p.numel() for p in generator.parameters()) + generator.positions.numel()
    assert count / 1e6 == pytest.approx(millions, abs=0.1)
    projector = sum(p.numel() for n, p in discriminator.named_parameters() if "projector" in n)
    assert projector / 1e6 == pytest.approx(7.3, abs=0.1)
    whole = sum(p.numel() for p in discriminator.parameters())
    assert (whole - projector) / 1e6 == pytest.approx(97.1, abs=0.1)


@pytest.mark.parametrize("name", CAT)
def test_the_hours_and_the_money_follow_from_the_operations(name: str) -> None:
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    job, (generator, discriminator) = training(name), on_meta(name)
    images, labels = judged(name)
    assert job.optimisation.activation_checkpointing and job.optimisation.reuse_generator_forward
    assert job.objective.penalty.share == 1 and job.objective.alignment.weight
    side = job.model.resolution * REDUCTION
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        dinov2 = transformers.Dinov2Model(transformers.Dinov2Config(image_size=224, patch_size=14))
    once = gmac(generator, torch.empty(1, 64, device="meta"), labels)
    pass_of_d = gmac(discriminator, images, labels, 0)
    aligned = gmac(discriminator, images, labels, 1) - pass_of_d
    encoded = gmac(vae.encoder, torch.empty(1, 3, side, side, device="meta"))
    taught = gmac(dinov2, torch.empty(1, 3, 224, 224, device="meta"))
    # Forward, again forward, and twice as much backward. D sees real, fake and both perturbed in
    # its own step; in G's step real, and fake with a gradient that isn't for its weights.
    total = 4 * once + (4 * 4 + 1 + 3) * pass_of_d + 4 * aligned + encoded + taught
    told = prose(name)
    assert f"{round(total):,} GMAC for an image" in told
    hours = [
        round(2e9 * total * job.run.total_images / (share * PEAK_FLOPS) / 3600)
        for share in (0.16, 0.22)
    ]
    found = re.search(r"(\d+) H100-hours at 16% .* (\d+) at 22%,.*: \$(\d+)-(\d+) at \$1-3", told)
    assert found
    assert [int(number) for number in found.groups()[:2]] == hours
    least, most = (int(number) for number in found.groups()[2:])
    assert (least, most) == pytest.approx((hours[1], 3 * hours[0]), abs=2)


@pytest.mark.parametrize(("name", "epochs"), list(zip(CAT, (20, 40, 60, 15, 5), strict=True)))
def test_the_lengths_are_whole_epochs_of_whole_batches(name: str, epochs: int) -> None:
    job = training(name)
    batch = job.optimisation.batch_size
    assert job.run.total_images == IMAGENET // batch * batch * epochs


@pytest.mark.parametrize(
    ("name", "rate"), [(name, 1.2e-4 if "_h2_" in name else 2e-4) for name in CAT]
)
def test_learning_rates_follow_the_width(name: str, rate: float) -> None:
    model, optimisation = training(name).model, training(name).optimisation
    width = model.generator.dimensions().width
    assert optimisation.generator.rate(width) == pytest.approx(rate)
    assert optimisation.discriminator.rate(768) == pytest.approx(2e-4)


def test_the_training_jobs_differ_in_size_length_and_machines_alone() -> None:
    jobs = [training(name) for name in CAT]
    assert len({job.run.folder for job in jobs}) == len(CAT)
    for part in ("objective", "optimisation", "data", "latents", "checkpoints"):
        assert all(getattr(job, part) == getattr(jobs[0], part) for job in jobs), part
    assert {job.model.discriminator.size for job in jobs} == {"B"}
    assert [job.model.generator.size for job in jobs] == ["B", "M", "H", "H", "H"]
    assert [job.model.resolution * REDUCTION for job in jobs] == [256, 256, 256, 512, 1024]
    for network in ("generator", "discriminator"):
        assert [getattr(job.model, network).patch for job in jobs] == [2, 2, 2, 2, 4]


@pytest.mark.parametrize("name", CAT)
def test_a_training_job_reads_what_a_preparation_writes(name: str) -> None:
    job = training(name)
    images = load(str(path("prepare_imagenet_images")), kind=Preparation)
    assert job.data.shards == images.output.folder
    # Alignment needs pictures, the networks latents; pictures as they are fit any resolution.
    assert (images.output.contents, images.output.encoding) == ("images", "original")
    assert job.objective.alignment.weight and job.latents.vae and job.workers.gpu
    assert "jobs/prepare_imagenet_images.yaml" in prose(name)


def test_without_alignment_the_latents_of_the_other_preparation_fit() -> None:
    (words,) = [words for words in commands("cat_b2_256") if "latents.vae=null" in words]
    job = load(str(path("cat_b2_256")), [word for word in words if word != "--set"])
    latents = load(str(path("prepare_imagenet")), kind=Preparation)
    assert job.data.shards == latents.output.folder and latents.output.contents == "latents"
    assert latents.output.resolution == job.model.resolution * REDUCTION
    assert latents.latents == training("cat_b2_256").latents
    assert not job.objective.alignment.weight


@pytest.mark.parametrize("name", ["cat_h2_512", "cat_h2_1024"])
def test_a_higher_resolution_goes_on_from_a_lower_one_as_its_first_comment_says(name: str) -> None:
    given = [words for words in commands(name) if "--initialise-from" in words]
    runs = {training(other).run.folder: training(other) for other in CAT}
    exact = 0
    for words in given:
        job = load(str(path(name)), continued(words))
        assert job.run.initialise_from is not None
        rules = rules_between(runs[job.run.initialise_from], job).rules
        assert all(rule.source is not None for rule in rules)
        exact += any("each pixel repeated over 2 x 2" in rule.told for rule in rules)
    assert (len(given), exact) == ((2, 1) if name == "cat_h2_512" else (1, 1))


def test_samples_and_fid_are_of_the_run_that_a_training_job_leaves() -> None:
    run = training("cat_h2_256").run.folder
    sampled = load(str(path("sample")), kind=Sampling)
    measured = load(str(path("fid50k")), kind=Measurement)
    assert sampled.samples.checkpoint == measured.samples.checkpoint == run
    # The comment says that they are the same samples.
    assert (sampled.samples, sampled.latents) == (measured.samples, measured.latents)
    assert "imagenet256" in measured.reference
    offline = load(str(path("fid")), kind=Measurement)
    quickstart = training("quickstart")
    assert offline.samples.checkpoint == quickstart.run.folder
    assert offline.reference == quickstart.data.shards
