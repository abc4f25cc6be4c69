"""Versions of what decides a run's numbers."""

import platform
from importlib.metadata import version

PACKAGES = ("cat-ray", "torch", "ray", "deepspeed", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Version by package, and Python's."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
