"""Following an attempt's log to its end, and starting the next attempt where that helps."""

import asyncio
import time
from collections.abc import Callable

from cat_ray.errors import NotFollowed, RunFailed
from cat_ray.submission.attempt import POLL_SECONDS, Parcel, how_to_go_on, start
from cat_ray.submission.ending import Ending, goes_on, pause_seconds
from cat_ray.submission.server import JobServer, ServerDown, ending_of

# For how long a server that doesn't answer is asked again.
PATIENCE_SECONDS = 120.0
# A log that is silent for so long may be a connection that broke without a word.
SILENCE_SECONDS = 30.0

Tell = Callable[[str], None]


class Follower:
    """Follows one attempt; what was shown is not shown again after the connection broke."""

    def __init__(self, server: JobServer, submission_id: str, show: Tell):
        self._server = server
        self._id = submission_id
        self._show = show
        self._shown = 0

    def follow(self) -> Ending:
        """Shows the log until the attempt ends.

        Raises:
            RunFailed: nobody answers any more.
            NotFollowed: Ctrl-C was pressed; the attempt goes on.
        """
        try:
            return self._to_the_end()
        except KeyboardInterrupt:
            raise NotFollowed(
                f"{self._id} runs on: {how_to_go_on(self._server, self._id)}"
            ) from None

    def _to_the_end(self) -> Ending:
        down_since: float | None = None
        while True:
            try:
                asyncio.run(self._show_rest())
                ending = ending_of(self._server.job(self._id))
                if ending is not None:
                    return ending
                down_since = None
            except ServerDown as error:
                down_since = down_since or time.monotonic()
                if time.monotonic() - down_since > PATIENCE_SECONDS:
                    raise RunFailed(
                        f"{error}; {self._id} may run on: {how_to_go_on(self._server, self._id)}"
                    ) from error
            time.sleep(POLL_SECONDS)

    async def _show_rest(self) -> None:
        position = 0
        pieces = aiter(self._server.tail(self._id))
        while True:
            coming = asyncio.ensure_future(anext(pieces, None))
            while not (await asyncio.wait({coming}, timeout=SILENCE_SECONDS))[0]:
                if ending_of(self._server.job(self._id)) is not None:
                    coming.cancel()
                    return
            piece = coming.result()
            if piece is None:
                return
            new = piece[max(0, self._shown - position) :]
            position += len(piece)
            self._shown = max(self._shown, position)
            if new:
                self._show(new)


def follow_with_retries(
    server: JobServer,
    parcel: Parcel,
    submission_id: str,
    retries: int,
    retry_failures: bool,
    show: Tell,
    say: Tell,
) -> Ending:
    """Follows an attempt, and those after it.

    Args:
        server: where it runs.
        parcel: what to send again.
        submission_id: of the first attempt, which was started.
        retries: how many more there may be.
        retry_failures: even after exit code 1.
        show: takes what an attempt writes.
        say: takes our own lines.

    Returns:
        How the last one ended.

    Raises:
        RunFailed: nobody answers any more.
        NotFollowed: Ctrl-C was pressed.
    """
    for retry in range(1, retries + 2):
        ending = Follower(server, submission_id, show).follow()
        if retry > retries or not goes_on(ending, retry_failures):
            break
        pause = pause_seconds(retry)
        say(f"{submission_id} ended: {ending}; retry {retry} of {retries} in {pause:.0f} s")
        try:
            time.sleep(pause)
        except KeyboardInterrupt:
            raise NotFollowed("there is no retry any more: the same command goes on") from None
        submission_id = start(server, parcel)
        say(f"submitted {submission_id}")
    say(f"{submission_id} ended: {ending}")
    return ending
