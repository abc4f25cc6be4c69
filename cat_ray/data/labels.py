"""Class ids, as text, JSON and tables hold them."""

import math
import re

# Above it one wrong label would be a table of classes that fills the memory.
MAX_CLASSES = 1_000_000
LARGEST_CLASS = MAX_CLASSES - 1
INTEGER = re.compile(r"[+-]?[0-9]+")


def class_id(label: object) -> int | None:
    """The class id that a label says, or None where it says that there is none.

    Raises:
        ValueError: it is no whole number, or one that no class has.
    """
    if label is None or label != label:
        return None
    if isinstance(label, bytes):
        label = label.decode(errors="replace")
    if isinstance(label, bool) or (isinstance(label, float) and math.isinf(label)):
        raise ValueError(f"{label!r} is not a number")
    if isinstance(label, str):
        text = label.strip()
        if not INTEGER.fullmatch(text):
            raise ValueError(f"{label!r} is not a whole number")
        number = int(text) if len(text) < 20 else LARGEST_CLASS + 1
    else:
        try:
            number = int(label)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{label!r} is not a number") from error
        if number != label:
            raise ValueError(f"{label!r} is not a whole number")
    if number > LARGEST_CLASS:
        raise ValueError(f"{number} is above {LARGEST_CLASS}")
    return number
