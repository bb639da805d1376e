"""What can go wrong, as one clear line: where, what was expected, what was found, what to do."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class SddLoraError(Exception):
    """Something failed; the command line prints the message and exits with `exit_code`."""

    exit_code = 1


class BadInput(SddLoraError):
    """The input is wrong (missing, truncated, another family, …): nothing was written."""

    exit_code = 2


class Busy(BadInput):
    """Another process holds the file or folder."""


def first_problem(error: "ValidationError") -> str:
    """Where the first wrong field is, and what was expected there."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg']}" if where else problem["msg"]
