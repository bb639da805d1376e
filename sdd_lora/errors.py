"""What can go wrong, as one clear line: where, what was expected, what was found, what to do."""


class SddLoraError(Exception):
    """Something failed; the command line prints the message and exits with `exit_code`."""

    exit_code = 1


class BadInput(SddLoraError):
    """The input is wrong (missing, truncated, another family, …): nothing was written."""

    exit_code = 2


class Busy(BadInput):
    """Another process holds the file or folder."""
