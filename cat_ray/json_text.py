"""JSON that anybody may have written or changed: whatever is wrong with it is a ValueError."""

import json
from typing import Any


def parse_json(content: bytes | str) -> Any:
    """The value that a JSON text holds.

    Raises:
        ValueError: it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_object(content: bytes | str) -> dict[str, Any]:
    """The object that a JSON text holds.

    Raises:
        ValueError: it is no JSON, nested too deeply to be read, or no object.
    """
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value
