"""Shows how far a job of many equal parts is: a bar on a terminal, plain lines in a job's log."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from cat_ray.errors import printable


class Counting:
    """Counts parts as they are done, for as long as the block lasts."""

    def __init__(self, what: str, total: int, done: int = 0):
        self._what, self._total, self._done = what, total, done
        self._console = Console(soft_wrap=True, highlight=False)
        self._bar = Bar(
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} {task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> "Counting":
        self._bar.start()
        self._task = self._bar.add_task(self._what, total=self._total, completed=self._done)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def add(self, told: str) -> None:
        """One more is done."""
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        if not self._console.is_terminal:
            line = f"{self._done:,} of {self._total:,} {self._what}  {told}"
            self._console.print(printable(line), markup=False)
