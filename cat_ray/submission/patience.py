"""Waiting for a job server that is away for a while, as where its head is started anew."""

import time
from collections.abc import Callable
from typing import TypeVar

from cat_ray.submission.transport import ServerDown

# A pod with a large image takes this long to come back.
PATIENCE_SECONDS = 1800.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
REMIND_SECONDS = 300.0

Tell = Callable[[str], None]
Answer = TypeVar("Answer")


def patiently(ask: Callable[[], Answer], say: Tell) -> Answer:
    """Calls `ask` until the server answers, with growing pauses, for `PATIENCE_SECONDS`.

    Args:
        ask: asks a job server; it must be safe to call again.
        say: takes a line when the server is away, now and then while it is, and once it is back.

    Raises:
        ServerDown: it is still away after that time.
    """
    began = time.monotonic()
    pause, remind_at = FIRST_PAUSE_SECONDS, began
    while True:
        try:
            answer = ask()
        except ServerDown as error:
            now = time.monotonic()
            left = began + PATIENCE_SECONDS - now
            if left < pause:
                raise
            if now >= remind_at:
                say(f"{error}; asking again for another {left / 60:.0f} min")
                remind_at = now + REMIND_SECONDS
        else:
            if remind_at > began:
                say(f"the job server answers again, after {time.monotonic() - began:.0f} s")
            return answer
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
