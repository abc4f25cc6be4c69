"""The command line: each command a few lines that call a module.

Modules are imported in the commands, so that help and mistakes are told at once.
"""

# Imported in the order in which `cat-ray --help` lists their commands.
from cat_ray.cli import (  # noqa: F401, I001
    doctor,
    planning,
    data,
    runs,
    jobs,
    evaluation,
    export,
    proofs,
    bench,
)
from cat_ray.cli.shell import app

__all__ = ["app"]
