"""What jobs of every kind share: strict sections, and how storage and a VAE are named."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from cat_ray import uris
from cat_ray.errors import BadInput
from cat_ray.storage import Location, locate

# In the context of a validation: leave `~` and `$NAME` to the machine that the job is sent to.
AS_WRITTEN = {"as_written": True}


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about its keys; no number is infinite.

    What a validation complains about doesn't repeat the values: they may hold credentials.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @field_validator("*", mode="wrap")
    @classmethod
    def _truth_is_no_number(cls, value: Any, valid: ValidatorFunctionWrapHandler) -> Any:
        found = valid(value)
        values = value if isinstance(value, list) else [value]
        kept = found if isinstance(value, list) else [found]
        if any(
            isinstance(a, bool) and not isinstance(b, bool)
            for a, b in zip(values, kept, strict=True)
        ):
            raise ValueError("true and false are no numbers")
        return found


def _read_by(read: Callable[[str], str]) -> AfterValidator:
    """Has a value read, with its variables expanded; what is wrong with it ends the validation."""

    def valid(value: str, info: ValidationInfo) -> str:
        try:
            if info.context == AS_WRITTEN:
                uris.check_has_no_credentials(value)
                return value
            return read(uris.expanded(value))
        except BadInput as error:
            raise ValueError(str(error)) from error

    return AfterValidator(valid)


def _checked_by(check: Callable[[str], object]) -> AfterValidator:
    """Has a value checked, and leaves it as it is."""

    def valid(value: str) -> str:
        try:
            check(value)
        except BadInput as error:
            raise ValueError(str(error)) from error
        return value

    return AfterValidator(valid)


def _uri(text: str) -> str:
    uris.place_of(text)
    return text


def _path(text: str) -> str:
    place = uris.place_of(text)
    if place.scheme != "file":
        raise BadInput(f"{text}: use a path of this machine, not an object store")
    return place.path if text.lower().startswith("file:") else text


# A folder or file on this machine or in an object store, see `cat_ray.uris`.
Uri = Annotated[str, _read_by(_uri)]
# On this machine, for what doesn't go through `locate`.
LocalPath = Annotated[str, _read_by(_path)]
# A local folder or a hub's name.
ModelName = Annotated[str, _read_by(str)]
# Below a place, which says where it is.
FilePattern = Annotated[str, Field(min_length=1), _checked_by(uris.check_has_no_credentials)]
# Of an object store's server, and of another one.
EndpointUrl = Annotated[str, _checked_by(uris.endpoint_of)]
HttpUrl = Annotated[str, _checked_by(uris.check_url)]


class Storage(Section):
    """How s3:// is reached. Credentials come from the standard AWS chain, never from here.

    Whatever is read or written is retried for `retry_seconds` while the storage doesn't answer.
    """

    endpoint_url: EndpointUrl | None = None
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

    vae: ModelName | None = None
    revision: str | None = None
