"""`python -m cat_ray`: the command, where only the package is at hand."""

from cat_ray.cli import app

app(prog_name="cat-ray")
