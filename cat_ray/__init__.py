"""Trains CAT, a one-step multi-stage GAN, on a Ray cluster."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cat_ray.evaluation.sampling import to_pixels
    from cat_ray.exported import ExportedGenerator, load_generator

__version__ = "0.1.0"
__all__ = ["ExportedGenerator", "load_generator", "to_pixels"]

_HOMES = {
    "ExportedGenerator": "cat_ray.exported",
    "load_generator": "cat_ray.exported",
    "to_pixels": "cat_ray.evaluation.sampling",
}


def __getattr__(name: str) -> Any:
    # Not before it is asked for: torch takes seconds to import, and commands must answer at once.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
