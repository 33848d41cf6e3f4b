"""The errors a user can act on.

Every job prints a :class:`SegcloudError` as one line, without a traceback, and ends with its exit code;
anything else is a bug in segcloud and keeps its traceback.
"""

import traceback

EXIT_OK = 0
EXIT_FAILED = 1
"""The job could not do its work (storage unreachable, training diverged, worker lost too often)."""
EXIT_USAGE = 2
"""The command, the config or the dataset as a whole is wrong; nothing was started."""
EXIT_INCOMPLETE = 3
"""The job ended, but some cases were left out; each has a verdict."""


class SegcloudError(Exception):
    """An error whose message names what was wrong and the remedy, in one line."""

    exit_code = EXIT_FAILED


class UsageError(SegcloudError):
    """The command line, the config or the dataset does not allow the job to start."""

    exit_code = EXIT_USAGE


def describe_failure(error: Exception) -> str:
    """One line for an unforeseen error on one scan: what, and where in the code."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{what} (in {where.name}, line {where.lineno}); report this scan's header and shape"


def last_line(error: Exception) -> str:
    """The last line of an error's text, where Ray puts the cause below a remote traceback; else its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
