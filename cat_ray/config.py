"""The typed configuration of a run: YAML in, unknown keys refused, the resolved form out.

A length of time or work carries its unit in its name; the unit of work is the image.
"""

import difflib
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from cat_ray.data.labels import MAX_CLASSES
from cat_ray.errors import BadInput
from cat_ray.evaluation.measurement import BesideTraining
from cat_ray.job_yaml import read_text, read_yaml
from cat_ray.model.sizes import SIZES, Size, scales
from cat_ray.objective.settings import AugmentPolicy, default_stage_weights
from cat_ray.section import (
    AS_WRITTEN,
    HttpUrl,
    Latents,
    LocalPath,
    ModelName,
    Section,
    Storage,
    Uri,
)
from cat_ray.uris import redacted

REFERENCE_WIDTH = 768


class Run(Section):
    """Where a run lives, its seed, its length, and what its networks begin as.

    `initialise_from` is a checkpoint of another run, or that run's folder for its newest one: G, D
    and the averages go on from it, images seen and the optimisers' moments begin anew. Unset, the
    networks begin at random.
    """

    folder: Uri
    total_images: int = Field(gt=0)
    seed: int = Field(default=0, ge=0)
    initialise_from: Uri | None = None


class Data(Section):
    """The shards, how they are read, and what to make of a sample that can't be.

    Attributes:
        shards: their folder, with an `index.json`.
        num_classes: class ids are below this.
        source: what the shards are made from when the folder has no index yet.
        max_broken_samples: how many samples that can't be read a call of the command survives.
        block_images: neighbours in a shard that are read together, about a mebibyte if unset. A
            batch may hold several of a block: fewer shuffle better, more read faster.
        window_megabytes: while one window of the stream is trained on the next two are read; each
            is held decoded in memory, this much of it in each worker.
        cache_folder: where each machine keeps what it has read, for the next epochs.
        cache_gigabytes: how much of it.
    """

    shards: Uri
    num_classes: int = Field(gt=0, le=MAX_CLASSES)
    source: Literal["mnist"] | None = None
    max_broken_samples: int = Field(default=100, ge=0)
    block_images: int | None = Field(default=None, gt=0)
    window_megabytes: int = Field(default=128, gt=0)
    cache_folder: LocalPath | None = None
    cache_gigabytes: float = Field(default=100.0, gt=0)


class ExplicitSize(Section):
    """A network size that is not in the size table."""

    depth: int = Field(gt=0)
    width: int = Field(gt=0)
    heads: int = Field(gt=0)


class Network(Section):
    """A transformer's size (a name of the size table, or depth, width and heads) and its tokens.

    Attributes:
        patch: pixels on a side of a token.
        position_grid: the grid whose tokens stand at whole positions, the network's own if unset.
            Token i of a grid of g stands at (i + 1/2) * position_grid / g - 1/2 on each axis, for
            the sine and cosine table and the rotary one alike. The discriminator's is that of its
            finest scale, the coarser ones' are in proportion.
    """

    size: Literal["S", "B", "M", "L", "XL", "H"] | ExplicitSize = "B"
    patch: int = Field(default=2, gt=0)
    position_grid: int | None = Field(default=None, gt=0)

    def dimensions(self) -> Size:
        """Depth, width and heads."""
        if isinstance(self.size, ExplicitSize):
            return Size(**self.size.model_dump())
        return SIZES[self.size]

    @model_validator(mode="after")
    def _check(self) -> "Network":
        size = self.dimensions()
        if size.width % (4 * size.heads):
            raise ValueError(
                f"width {size.width} must be a multiple of 4 x heads ({4 * size.heads}): "
                "rotary positions need four features per head"
            )
        return self


class GeneratorNetwork(Network):
    """The generator."""

    latent_width: int = Field(default=64, gt=0)
    mapping_lr_multiplier: float = Field(default=0.01, gt=0)


class DiscriminatorNetwork(Network):
    """The discriminator. `scope` is what a token may see: its own scale (CAT), or all of them."""

    projection_width: int = Field(default=2048, gt=0)
    class_lr_multiplier: float = Field(default=0.01, gt=0)
    scope: Literal["scale_wise", "aggregated"] = "scale_wise"


class Model(Section):
    """The two networks and the square images, or latents, that they work on."""

    resolution: int = Field(default=32, gt=0)
    channels: int = Field(default=4, gt=0)
    stages: int = Field(default=4, ge=2)
    generator: GeneratorNetwork = GeneratorNetwork()
    discriminator: DiscriminatorNetwork = DiscriminatorNetwork()

    def scales(self) -> tuple[int, ...]:
        """The side of each stage's image as the discriminator sees it."""
        return scales(self.resolution, self.stages)

    @model_validator(mode="after")
    def _check(self) -> "Model":
        if self.resolution % self.generator.patch:
            raise ValueError(
                f"resolution {self.resolution} is not a multiple of "
                f"generator.patch {self.generator.patch}"
            )
        depth = self.generator.dimensions().depth
        if depth % self.stages:
            raise ValueError(
                f"the generator's depth {depth} is not a multiple of stages {self.stages}"
            )
        patch = self.discriminator.patch
        if any(scale % patch for scale in self.scales()):
            raise ValueError(
                f"discriminator.patch {patch} doesn't divide the scales {self.scales()}: "
                "use a smaller patch, or fewer stages"
            )
        return self


class Penalty(Section):
    """Finite-difference R1 and R2; `share` is the part of the batch they are measured on."""

    weight: float = Field(default=0.1, ge=0)
    sigma: float = Field(default=0.01, gt=0)
    share: float = Field(default=1.0, gt=0, le=1)
    reduction: Literal["mean", "sum"] = "mean"


class Consistency(Section):
    """CAT's consistency term; weight 0 is the ablation without it."""

    weight: float = Field(default=0.1, ge=0)
    stage_weights: tuple[float, ...] | None = None
    stop_gradient: Literal["none", "final", "intermediate"] = "none"


class Alignment(Section):
    """DINOv2 alignment of the discriminator on real images; weight 0 is off.

    `teacher` is a local folder or a hub name that transformers can load.
    """

    weight: float = Field(default=0.0, ge=0)
    teacher: ModelName = "facebook/dinov2-base"
    teacher_width: int = Field(default=768, gt=0)


class Augment(Section):
    """DiffAugment: probability of each colour change and of a flip, and shares of a side."""

    color: float = Field(default=0.5, ge=0, le=1)
    translation: float = Field(default=0.125, ge=0, lt=1)
    cutout: float = Field(default=0.5, ge=0, lt=1)
    flip: float = Field(default=0.4, ge=0, le=1)

    def policy(self) -> AugmentPolicy:
        """The same numbers as the augmentation takes them."""
        return AugmentPolicy(**self.model_dump())


class Objective(Section):
    """What the two networks minimise."""

    penalty: Penalty = Penalty()
    consistency: Consistency = Consistency()
    alignment: Alignment = Alignment()
    augment: Augment = Augment()


Offload = Literal["none", "optimiser", "all"]


class EngineSettings(Section):
    """One DeepSpeed engine: ZeRO stage and the learning rate at width 768.

    With `width_aware` the rate used is `learning_rate * 768 / width` (GAT's rule).

    Attributes:
        offload: what the host's memory holds in place of the GPU's: of a ZeRO engine the
            optimiser's state and masters, under ZeRO 3 the weights as well.
    """

    learning_rate: float = Field(default=2e-4, gt=0)
    width_aware: bool = True
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Offload = "none"

    def rate(self, width: int) -> float:
        """The learning rate of a network of this width."""
        return self.learning_rate * (REFERENCE_WIDTH / width if self.width_aware else 1.0)

    @model_validator(mode="after")
    def _check(self) -> "EngineSettings":
        least = {"none": 0, "optimiser": 1, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(
                f"offload {self.offload} needs zero_stage {least if least == 3 else '1, 2 or 3'}, "
                f"not {self.zero_stage}"
            )
        return self


class Optimisation(Section):
    """The optimiser, the global batch, and the lanes it is cut into.

    Attributes:
        micro_batch_lanes: how many of its lanes a worker puts through the networks at once, all if
            unset; fewer need less memory, and the generator then makes the fakes twice.
        reuse_generator_forward: the fakes of the discriminator's step serve the generator's too.
        compile: the networks' blocks, and the VAE's encoder, with torch.compile.
    """

    batch_size: int = Field(default=512, gt=0)
    lanes: int = Field(default=64, gt=0)
    betas: tuple[float, float] = (0.0, 0.99)
    gradient_clip: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    activation_checkpointing: bool = False
    reuse_generator_forward: bool = True
    micro_batch_lanes: int | None = Field(default=None, ge=2)
    compile: bool = False
    ema_decays: tuple[float, ...] = Field(default=(0.999,), min_length=1)
    generator: EngineSettings = EngineSettings()
    discriminator: EngineSettings = EngineSettings()

    @property
    def lane_size(self) -> int:
        """Images that a lane adds to a batch."""
        return self.batch_size // self.lanes

    def reuses_forward(self, workers: int) -> bool:
        """Whether each of so many workers makes the fakes once for both steps."""
        most = self.micro_batch_lanes
        at_once = most is None or most * workers >= self.lanes
        return self.reuse_generator_forward and at_once

    @model_validator(mode="after")
    def _check(self) -> "Optimisation":
        if self.batch_size % self.lanes:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of lanes {self.lanes}"
            )
        if not all(0 <= decay < 1 for decay in self.ema_decays):
            raise ValueError(f"each of ema_decays {self.ema_decays} must be in [0, 1)")
        return self


class Workers(Section):
    """The Ray Train worker group: one process each, a GPU each where `gpu` is set.

    The group shrinks when nodes go and grows when nodes come, between `minimum` and `maximum`.

    Attributes:
        max_failures: failures in a row, without a new checkpoint between them, that a run survives.
        max_preemptions: how often it gives way to a preemption; unlimited if unset.
        start_seconds: how long to wait for the resources of a group before counting nodes anew.
        resize_check_seconds: how often to look for nodes that came or are about to go.
        capacity_seconds: how long to wait while there are fewer than `minimum`; for ever if unset.
        stall_seconds: a step that takes longer has stalled, and the group starts again.
    """

    minimum: int = Field(default=1, gt=0)
    maximum: int = Field(default=1, gt=0)
    gpu: bool = False
    cpus_per_worker: float = Field(default=1.0, gt=0)
    max_failures: int = Field(default=3, ge=0)
    max_preemptions: int | None = Field(default=None, ge=0)
    start_seconds: float = Field(default=5.0, gt=0)
    resize_check_seconds: float = Field(default=5.0, gt=0)
    capacity_seconds: float | None = Field(default=None, gt=0)
    stall_seconds: float = Field(default=300.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "Workers":
        if self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum} is more than maximum {self.maximum}")
        return self


class Preemption(Section):
    """Who tells that a machine will be taken away, beside Ray's drains and SIGTERM.

    Attributes:
        cloud: whose metadata endpoint to ask.
        metadata_url: where it is, for tests; the cloud's own address if unset.
        poll_seconds: how often to ask.
        margin: a save must take at most 1 / margin of the time that is left.
    """

    cloud: Literal["aws", "gcp", "azure"] | None = None
    metadata_url: HttpUrl | None = None
    poll_seconds: float = Field(default=5.0, gt=0)
    margin: float = Field(default=1.5, ge=1)


class Checkpoints(Section):
    """When to save, how, and how many to keep.

    Attributes:
        save_every_images: the interval.
        keep: how many of the newest stay.
        keep_every_images: beside those, the first at or past each multiple of this stays.
        pending_saves: saves that may be under way in the background before training waits.
        local_folder: where a worker's part waits for its upload; the temporary folder if unset.
        retry_seconds: for how long an upload is retried while the storage is down;
            storage.retry_seconds if unset.
    """

    save_every_images: int = Field(default=1_000_000, gt=0)
    keep: int = Field(default=3, gt=0)
    keep_every_images: int | None = Field(default=None, gt=0)
    pending_saves: int = Field(default=1, gt=0)
    local_folder: LocalPath | None = None
    retry_seconds: float | None = Field(default=None, ge=0)


class Health(Section):
    """What a sick GAN looks like, and how often to go back to a healthy one.

    A step is bad if a figure is not finite, if R1 or R2 is above `penalty`, or if the discriminator
    has won: it ranks at least `won_accuracy` of the pairs rightly while the generator's loss is at
    least `won_generator_loss`. After `bad_steps` in a row the run goes back to the newest
    checkpoint, with other noise, at most `max_rollbacks` times.
    """

    bad_steps: int = Field(default=20, gt=0)
    penalty: float = Field(default=1e6, gt=0)
    won_accuracy: float = Field(default=0.999, gt=0, le=1)
    won_generator_loss: float = Field(default=20.0, gt=0)
    max_rollbacks: int = Field(default=3, ge=0)


class Cost(Section):
    """What an hour of one worker costs, a GPU or, without, its share of a machine."""

    spot_per_gpu_hour: float | None = Field(default=None, ge=0)
    on_demand_per_gpu_hour: float | None = Field(default=None, ge=0)


class Reporting(Section):
    """When to print a line of figures, when to draw a grid of samples, and who else is told.

    `trackers` get the figures beside `metrics.jsonl` and TensorBoard; their environment variables
    say where to and with which key. With `sample_keys` each worker writes down which samples it
    trained on, for a proof that none is lost or doubled.
    """

    log_every_images: int = Field(default=10_000, gt=0)
    grid_every_images: int = Field(default=500_000, gt=0)
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    sample_keys: bool = False


class Evaluation(Section):
    """What is measured of the samples while training.

    `classifier` is the offline protocol: a classifier fitted to the real images, spread within a
    class, recall, and a Frechet distance on principal components of the pixels (not FID). The
    workers do it themselves; `fid` is what is measured of checkpoints, beside the training.
    """

    protocol: Literal["none", "classifier"] = "none"
    every_images: int = Field(default=500_000, gt=0)
    samples: int = Field(default=1000, ge=100)
    fid: BesideTraining | None = None


class Phase(Section):
    """A part of a job that is a run of its own: so many images, with other values by dotted key.

    The keys of `set` mean what they mean to `--set`, and win over it.
    """

    images: int = Field(gt=0)
    set: dict[str, Any] = Field(default={})


class Config(Section):
    """A training job; with a `schedule`, what its phases have in common (cat_ray/schedule.py)."""

    run: Run
    data: Data
    storage: Storage = Storage()
    latents: Latents = Latents()
    model: Model = Model()
    objective: Objective = Objective()
    optimisation: Optimisation = Optimisation()
    workers: Workers = Workers()
    preemption: Preemption = Preemption()
    checkpoints: Checkpoints = Checkpoints()
    health: Health = Health()
    cost: Cost = Cost()
    reporting: Reporting = Reporting()
    evaluation: Evaluation = Evaluation()
    schedule: tuple[Phase, ...] = ()

    def stage_weights(self) -> tuple[float, ...]:
        """The consistency term's weight of each stage but the last."""
        weights = self.objective.consistency.stage_weights
        return default_stage_weights(self.model.stages) if weights is None else weights

    def upload_retry_seconds(self) -> float:
        """For how long an upload of a checkpoint is retried while the storage is down."""
        own = self.checkpoints.retry_seconds
        return self.storage.retry_seconds if own is None else own

    def makes_latents(self) -> bool:
        """Whether the generator makes latents, not pictures."""
        return self.latents.vae is not None or self.model.channels not in (1, 3)

    def penalised_per_lane(self) -> int:
        """How many images of each lane the penalty is measured on."""
        return math.ceil(self.optimisation.lane_size * self.objective.penalty.share)

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if len(self.stage_weights()) != self.model.stages - 1:
            raise ValueError(
                f"objective.consistency.stage_weights needs {self.model.stages - 1} values, "
                "one for each stage but the last"
            )
        if self.workers.maximum > self.optimisation.lanes:
            raise ValueError(
                f"workers.maximum {self.workers.maximum} is more than "
                f"optimisation.lanes {self.optimisation.lanes}: a worker needs at least one lane"
            )
        beside, save_every = self.evaluation.fid, self.checkpoints.save_every_images
        if beside is not None and beside.every_images < save_every:
            raise ValueError(
                f"evaluation.fid.every_images {beside.every_images} is less than "
                f"checkpoints.save_every_images {save_every}: only checkpoints can be measured"
            )
        images = sum(phase.images for phase in self.schedule)
        if self.schedule and images != self.run.total_images:
            raise ValueError(
                f"the phases of schedule have {images} images together, run.total_images is "
                f"{self.run.total_images}: they must be the same"
            )
        if self.run.total_images % self.optimisation.batch_size:
            batch = self.optimisation.batch_size
            raise ValueError(
                f"run.total_images {self.run.total_images} is not a multiple of batch_size "
                f"{batch}: use {self.run.total_images // batch * batch or batch}"
            )
        return self


Job = TypeVar("Job", bound=Section)


def load(path: str, overrides: Sequence[str] = (), kind: type[Job] = Config) -> Job:
    """Reads a job file, one of training or of another kind, and applies overrides of the form
    `section.key=value`.

    Raises:
        BadInput: the file is missing, isn't YAML, or holds an unknown key or a bad value.
    """
    return parse(read_text(path), path, overrides, kind)


def parse(
    text: str,
    name: str,
    overrides: Sequence[str] = (),
    kind: type[Job] = Config,
    as_written: bool = False,
) -> Job:
    """As `load`, from YAML text.

    Args:
        text: the YAML.
        name: is used in messages.
        overrides: see `load`.
        kind: of job.
        as_written: leaves `~` and variables of the environment to the machine that it is sent to.
    """
    values = read_yaml(text, name)
    if not isinstance(values, dict):
        raise BadInput(f"{name} must hold sections such as run: and data:, see jobs/")
    needed = [key for key, field in kind.model_fields.items() if field.is_required()]
    if values and not values.keys() & set(needed):
        raise BadInput(f"{name} has no {' and no '.join(needed)}: is it a job of another command?")
    for override in overrides:
        _override(values, override)
    try:
        job = kind.model_validate(values, context=AS_WRITTEN if as_written else None)
    except ValidationError as error:
        lines = [_explain(dict(problem), kind) for problem in error.errors()]
        raise BadInput(f"{name}: " + "; ".join(lines)) from error
    if isinstance(job, Config) and job.schedule:
        # Not above: a phase is a job itself.
        from cat_ray.schedule import phases

        phases(job, name, as_written)
    return job


def dump(config: Section) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(config: Section) -> dict[str, Any]:
    """The configuration as dotted keys and plain values."""

    def walk(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, dict):
                flat |= walk(value, f"{prefix}{name}.")
            else:
                flat[f"{prefix}{name}"] = value
        return flat

    return walk(config.model_dump(mode="json"), "")


def _override(values: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    told = f"--set {redacted(override)}"
    if not separator:
        raise BadInput(f"{told}: write it as section.key=value")
    set_value(values, dotted, read_yaml(text, f"--set {dotted}"), told)


def set_value(values: dict[str, Any], dotted: str, value: Any, told: str) -> None:
    """Puts a value under a dotted key, in sections that are made if need be.

    Raises:
        BadInput: a part of the key is no section; `told` begins the message.
    """
    *sections, last = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise BadInput(f"{told}: {section} is a value, not a section")
    values[last] = value


def _explain(problem: dict[str, Any], kind: type[Section]) -> str:
    """One validation problem in a line; an unknown key comes with the nearest known one."""
    location = [str(part) for part in problem["loc"] if part != "ExplicitSize"]
    if location[:1] == ["schedule"] and len(location) > 1:
        within = {**problem, "loc": location[2:]}
        return f"phase {int(location[1]) + 1} of schedule: {_explain(within, Phase)}"
    dotted = ".".join(location)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(
            location[-1], _known_keys(location[:-1], kind), n=1, cutoff=0.5
        )
        hint = f", did you mean {'.'.join([*location[:-1], near[0]])}?" if near else ""
        return f"unknown key {dotted}{hint}"
    is_list = problem["type"] == "tuple_type"
    message = "must be a list" if is_list else problem["msg"].removeprefix("Value error, ")
    return f"{dotted}: {message}" if dotted else message


def _known_keys(location: Sequence[str], kind: type[Section]) -> list[str]:
    section: type[BaseModel] = kind
    for name in location:
        annotation = section.model_fields[name].annotation
        options = [annotation, *get_args(annotation)]
        section = next(
            (o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), section
        )
    return list(section.model_fields)
