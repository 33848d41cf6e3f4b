"""What all jobs share at the command line: arguments, errors as one line, exit codes."""

import argparse
import sys
from collections.abc import Callable

from segcloud.config import describe_fields
from segcloud.errors import SegcloudError


def parser(doc: str | None, with_config: bool = True) -> argparse.ArgumentParser:
    """An argument parser whose help starts with the job's docstring and ends with every config field."""
    made = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=describe_fields() if with_config else None,
        allow_abbrev=False,
    )
    if with_config:
        made.add_argument(
            "--config", metavar="FILE", help="YAML config, a path or s3:// URI (default: built-in)"
        )
        made.add_argument(
            "overrides", nargs="*", metavar="section.field=value", help="config overrides, see the list below"
        )
    return made


def main(job: Callable[[], int]) -> None:
    """Run a job and end the process with its exit code.

    A :class:`SegcloudError` is printed as it is, last, without a traceback: it names the case and the remedy.
    """
    try:
        code = job()
    except SegcloudError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)
