"""How numbers and lists of nodes are told."""

from collections.abc import Sequence

MEGA, GIGA = 10**6, 10**9
NAMES_SHOWN = 3


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    if len(names) <= NAMES_SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:NAMES_SHOWN])} and {len(names) - NAMES_SHOWN} more"


def counted(count: int, one: str, more: str = "") -> str:
    """So many of something, in the singular or the plural."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def in_bytes(count: float) -> str:
    """Bytes, in MB or GB."""
    return f"{count / GIGA:.3g} GB" if count >= GIGA else f"{count / MEGA:.3g} MB"


def in_rate(values: Sequence[float | None]) -> str:
    """From the slowest to the fastest, in MB/s, of bytes per second."""
    known = [value / MEGA for value in values if value is not None]
    low, high = f"{min(known):,.0f}", f"{max(known):,.0f}"
    return f"{low} MB/s" if low == high else f"{low} to {high} MB/s"


def in_time(seconds: float) -> str:
    """Seconds, in s, ms or µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
