"""The command that makes a generator of a checkpoint into a folder for others."""

from typing import Annotated

import typer

from cat_ray.cli.shell import Checkpoint, Endpoint, app, speaking_plainly
from cat_ray.storage import locate


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[str, typer.Option(help="A new or empty folder, or s3:// and the like.")],
    decay: Annotated[
        float | None, typer.Option(help="Which average of the weights; 0 for the raw ones.")
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write generator.onnx too, and compare it with PyTorch.")
    ] = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Write the generator as one folder, which opens without Ray or DeepSpeed."""
    with speaking_plainly():
        from cat_ray.operations.export import export as write

        folder = locate(out, endpoint_url)
        written = write(locate(checkpoint, endpoint_url), folder, decay, onnx)
        if onnx and written.onnx_differs_by is None:
            typer.echo("generator.onnx is not compared with PyTorch: pip install onnxruntime")
        elif onnx:
            typer.echo(f"generator.onnx is at most {written.onnx_differs_by:.1g} from PyTorch")
        typer.echo(f"open it with cat_ray.load_generator: {folder.uri}")
