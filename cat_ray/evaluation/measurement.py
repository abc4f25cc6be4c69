"""The typed jobs of `cat-ray sample` and `cat-ray fid`: which samples, what is kept of them, and
measured by what, against which real images."""

from typing import Literal

from pydantic import Field, model_validator

from cat_ray.section import Latents, LocalPath, Section, Storage, Uri

# Of precision and recall, which have to be fewer than the samples.
NEIGHBOURS = 3


class Drawing(Section):
    """Which samples of a checkpoint. Each is a function of it, seed and index, whoever makes it.

    Attributes:
        count: how many.
        seed: of latents and labels.
        labels: `uniform` draws each by chance, `balanced` has all classes equally often.
        truncation: how far styles are drawn to the mean of their class; 0 leaves them.
        decay: which average of the weights, the first if unset; 0 for the raw ones.
    """

    count: int = Field(default=50_000, gt=NEIGHBOURS)
    seed: int = Field(default=0, ge=0)
    labels: Literal["uniform", "balanced"] = "uniform"
    truncation: float = Field(default=0.0, ge=0.0, le=1.0)
    decay: float | None = Field(default=None, ge=0.0, lt=1.0)


class Samples(Drawing):
    """Which samples of which checkpoint: its folder, or a run's for the newest one."""

    checkpoint: Uri


class Features(Section):
    """What the distance is taken on.

    Attributes:
        network: `inception` is the network of 2015 that FID is defined on, `dinov2` a ViT whose
            class token makes Stein et al.'s distance; `pixels` needs no weights. What is taken on
            the last two is no FID, and isn't called one.
        weights: Inception's safetensors file, or the folder of a DINOv2 with its `config.json`.
        sha256: of the file, in that folder of `model.safetensors`.
    """

    network: Literal["inception", "dinov2", "pixels"] = "inception"
    weights: LocalPath | None = None
    sha256: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Features":
        if self.network != "pixels" and not (self.weights and self.sha256):
            raise ValueError(
                f"network {self.network} needs weights and their sha256, see the README"
            )
        return self


class Workers(Section):
    """Who does it.

    Attributes:
        count: processes that hold the networks; any number gives the same result.
        cpus_per_worker: cores of each. A sum's rounding depends on them: another number of cores,
            or a GPU, may change the last digits of a sample.
        gpu: a GPU for each.
        spare: they take what others leave of the cores, and none of Ray's.
    """

    count: int = Field(default=1, gt=0)
    cpus_per_worker: int = Field(default=1, gt=0)
    gpu: bool = False
    spare: bool = False


class Output(Section):
    """What is kept.

    Attributes:
        folder: of results, and of ranges until there is one.
        npz: the samples, as a file in ADM's format beside the result.
        png: the samples, a PNG file for each.
        shards: the samples, as WebDataset shards with their index.
    """

    folder: Uri
    npz: bool = False
    png: bool = False
    shards: bool = False


class Sampling(Section):
    """A job of `cat-ray sample`.

    Attributes:
        samples: which samples.
        output: where to, and in which forms.
        latents: the VAE, where the generator makes latents.
        storage: how s3:// is reached.
        workers: who does it.
    """

    samples: Samples
    output: Output
    latents: Latents = Latents()
    storage: Storage = Storage()
    workers: Workers = Workers()


class Measurement(Sampling):
    """A job of `cat-ray fid`: the samples are measured as well.

    Attributes:
        features: what they are measured by.
        reference: real images: an npz of ADM's, or a folder of image shards.
    """

    features: Features
    reference: Uri


class BesideTraining(Section):
    """What is measured of a run's checkpoints while it is trained.

    Attributes:
        every_images: the first checkpoint at or past each multiple of this is measured, and the
            last one.
        samples: which.
        features: what they are measured by.
        reference: as of `cat-ray fid`; the run's own shards if unset.
        workers: who does it, on what the training leaves of the cores if unset.
        keep_best: how many of the checkpoints with the least distance stay.
    """

    every_images: int = Field(gt=0)
    samples: Drawing = Drawing()
    features: Features
    reference: Uri | None = None
    workers: Workers = Workers(spare=True)
    keep_best: int = Field(default=1, ge=0)
