"""A process imports only what it uses: PyTorch alone takes seconds, and commands must answer."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("cat_ray.cli", {"torch", "ray", "pandas", "matplotlib", "transformers"}),
        # In Ray Data's processes.
        ("cat_ray.data.stream", {"torch", "matplotlib"}),
        ("cat_ray.data.reading_task", {"torch", "matplotlib"}),
        ("cat_ray.data.look", {"torch", "ray", "matplotlib"}),
    ],
)
def test_a_module_is_imported_without_what_it_does_not_use(module: str, unneeded: set[str]) -> None:
    told = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, check=True
    )
    assert unneeded.isdisjoint(result.stdout.split())
