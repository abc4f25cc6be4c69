"""Following an attempt's log to its end, and starting the next attempt where that helps."""

import asyncio
import time

from cat_ray.errors import BadInput, NotFollowed
from cat_ray.submission.attempt import POLL_SECONDS, Parcel, how_to_go_on, start
from cat_ray.submission.ending import Ending, goes_on, pause_seconds
from cat_ray.submission.patience import LONGEST_PAUSE_SECONDS, Tell, patiently
from cat_ray.submission.server import JobServer, NoSuchJob, ending_of
from cat_ray.submission.transport import ServerDown

# A log that is silent for so long may be a connection that broke without a word.
SILENCE_SECONDS = 30.0


class Follower:
    """Follows one attempt; what was shown is not shown again after the connection broke."""

    def __init__(self, server: JobServer, submission_id: str, show: Tell, say: Tell):
        self._server = server
        self._id = submission_id
        self._show = show
        self._say = say
        self._shown = 0

    def follow(self) -> Ending:
        """Shows the log until the attempt ends.

        Raises:
            ServerDown: nobody answers any more.
            NotFollowed: Ctrl-C was pressed; the attempt goes on.
        """
        try:
            return self._to_the_end()
        except ServerDown as error:
            raise ServerDown(
                f"{error}; {self._id} may run on: {how_to_go_on(self._server, self._id)}"
            ) from error
        except KeyboardInterrupt:
            raise NotFollowed(
                f"{self._id} runs on: {how_to_go_on(self._server, self._id)}"
            ) from None

    def _to_the_end(self) -> Ending:
        pause = POLL_SECONDS
        while True:
            cut = None
            try:
                asyncio.run(self._show_rest())
                ending = self._ending()
            except (ServerDown, NoSuchJob) as error:
                cut, ending = error, patiently(self._ending, self._say)
            if ending is not None:
                if cut is not None:
                    self._show_whole()
                return ending
            time.sleep(pause)
            pause = POLL_SECONDS if cut is None else min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _ending(self) -> Ending | None:
        try:
            return ending_of(self._server.job(self._id))
        except NoSuchJob:
            # It was known before: a head that starts anew may have forgotten its jobs, which
            # ended with it.
            return Ending(stopped=False, code=None, message="the cluster forgot it")

    def _show_whole(self) -> None:
        """Shows the rest of a log whose attempt has ended, where it couldn't be followed."""
        try:
            self._show_new(0, self._server.log(self._id))
        except (ServerDown, BadInput) as error:
            self._say(f"the rest of the log of {self._id} can't be read: {error}")

    async def _show_rest(self) -> None:
        """Shows the log from where it was shown, as it is written, to its end.

        Raises:
            ServerDown: it broke off.
        """
        position = 0
        pieces = aiter(self._server.tail(self._id))
        while True:
            coming = asyncio.ensure_future(anext(pieces, None))
            while not (await asyncio.wait({coming}, timeout=SILENCE_SECONDS))[0]:
                # Not in this thread, whose loop is running.
                job = await asyncio.to_thread(self._server.job, self._id)
                if ending_of(job) is not None:
                    coming.cancel()
                    raise ServerDown(f"the log of {self._id} came to no end")
            piece = coming.result()
            if piece is None:
                return
            self._show_new(position, piece)
            position += len(piece)

    def _show_new(self, position: int, piece: str) -> None:
        """Shows of a piece at a position of the log what hasn't been shown."""
        new = piece[max(0, self._shown - position) :]
        self._shown = max(self._shown, position + len(piece))
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
        ServerDown: nobody answers any more.
        NotFollowed: Ctrl-C was pressed.
    """
    for retry in range(1, retries + 2):
        ending = Follower(server, submission_id, show, say).follow()
        if retry > retries or not goes_on(ending, retry_failures):
            break
        pause = pause_seconds(retry)
        say(f"{submission_id} ended: {ending}; retry {retry} of {retries} in {pause:.0f} s")
        try:
            time.sleep(pause)
            submission_id = start(server, parcel, say)
        except KeyboardInterrupt:
            raise NotFollowed("interrupted before the retry: the same command goes on") from None
        say(f"submitted {submission_id}")
    say(f"{submission_id} ended: {ending}")
    return ending
