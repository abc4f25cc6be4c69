"""Versions of what decides a run's numbers."""

import platform
from importlib.metadata import version

from cat_ray import __version__

PACKAGES = ("torch", "ray", "deepspeed", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Version by package, and Python's."""
    # Our own code may have come with a job, and not be installed where it runs.
    ours = {"python": platform.python_version(), "cat-ray": __version__}
    return ours | {name: version(name) for name in PACKAGES}
