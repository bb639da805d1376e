"""Progress and messages go to stderr, so that stdout holds results alone."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

log = logging.getLogger("sdd_lora")


class Advance(Protocol):
    """Moves a bar on by `steps`; `note` stands at its end (loss, speed)."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


def say(message: str) -> None:
    """A message for the person at the terminal."""
    log.info(message)


def warn(message: str) -> None:
    """Something a person should know even with `--quiet`."""
    log.warning(message)


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A bar with time left on stderr; silent with `--quiet`, plain lines where no terminal is."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )  # fmt: skip

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        console=console, disable=not log.isEnabledFor(logging.INFO),
    )  # fmt: skip
    with bar:
        task = bar.add_task(description, total=total, completed=done, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            bar.update(task, advance=steps, note=note)

        yield advance
