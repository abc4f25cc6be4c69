"""What jobs of every kind share: strict sections, and how storage and a VAE are named."""

from pydantic import BaseModel, ConfigDict, Field

from cat_ray.storage import Location, locate


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Storage(Section):
    """How s3:// is reached. Credentials come from the standard AWS chain, never from here.

    Whatever is read or written is retried for `retry_seconds` while the storage doesn't answer.
    """

    endpoint_url: str | None = None
    region: str | None = None
    retry_seconds: float = Field(default=300.0, ge=0)

    def locate(self, uri: str) -> Location:
        """The place that a URI names, as `cat_ray.storage.locate`."""
        return locate(uri, self.endpoint_url, self.region, self.retry_seconds)


class Latents(Section):
    """Stable Diffusion's VAE, where the networks work on its latents.

    Shards of images are encoded on the fly; shards of latents need it only to show pictures.

    Attributes:
        vae: a local folder or a hub name that diffusers can load.
        revision: the hub's branch, tag or commit.
    """

    vae: str | None = None
    revision: str | None = None
