"""Progress and messages go to stderr, so that stdout holds results alone."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

log = logging.getLogger("sdd_lora")
_SECONDS_BETWEEN_LINES = 30
_under_way: list[str] = []  # bars, the outermost first, which alone is shown


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
def _noted(description: str) -> Iterator[None]:
    _under_way.append(description)
    try:
        yield
    finally:
        _under_way.pop()


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A bar with time left, on a terminal's stderr or in a notebook; elsewhere a line every half
    minute; nothing inside another bar, or where the log "sdd_lora" is set above INFO, as `--quiet`
    does."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    has_bars = console.is_terminal or console.is_jupyter
    is_wanted = log.level == logging.NOTSET or log.isEnabledFor(logging.INFO)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    shown = has_bars and is_wanted and not _under_way
    with Progress(*columns, console=console, disable=not shown) as bar, _noted(description):
        task = bar.add_task(description, total=total, completed=done, note="")
        started, said = time.monotonic(), time.monotonic()
        made = done

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal made, said
            made += steps
            bar.update(task, advance=steps, note=note)
            due = time.monotonic() - said > _SECONDS_BETWEEN_LINES
            if due and not has_bars and len(_under_way) == 1:
                said = time.monotonic()
                left = (said - started) / max(1, made - done) * (total - made)
                say(f"{description} {made}/{total}  {left:.0f} s left  {note}".rstrip())

        yield advance
