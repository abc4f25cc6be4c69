"""A plot as a file's content. Apart from pictures of samples, which need no matplotlib."""

import io

from matplotlib.figure import Figure


def to_png(figure: Figure, dots_per_inch: int = 100) -> bytes:
    """The plot as a PNG file's content."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dots_per_inch)
    return content.getvalue()
