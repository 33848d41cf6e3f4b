"""Progress of long work: a bar with rate and ETA in a terminal, plain lines elsewhere (``ray job logs``)."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY_S = 10.0
"""Seconds between plain lines where there is no terminal to redraw."""


class Progress:
    """Counts `total` units of work; lines written through :meth:`line` do not disturb the bar.

    Args:
        what: name of the work, e.g. ``prepare``.
        total: number of units.
        unit: name of one unit.
    """

    def __init__(self, what: str, total: int, unit: str):
        self.what, self.total, self.unit = what, total, unit
        self.done, self.note = 0, ""
        self._started = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def line(self, text: str) -> None:
        """Print a line of its own on standard output."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def start_at(self, done: int) -> None:
        """Count units that an earlier run did; they do not enter the rate."""
        self.done = done
        if self._bar is not None:
            self._bar.initial = self._bar.n = done
            self._bar.refresh()

    def advance(self, units: int = 1, note: str = "", quiet: bool = False) -> None:
        """Count finished units.

        Args:
            units: how many.
            note: shown behind the bar.
            quiet: no plain line: the caller prints its own.
        """
        self.done += units
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(units)
            return
        now = time.monotonic()
        if not quiet and (now - self._last >= LINE_EVERY_S or self.done >= self.total):
            self._last = now
            rate = self.done / max(now - self._started, 1e-9)
            eta = (
                f", {format_seconds((self.total - self.done) / rate)} left" if self.done < self.total else ""
            )
            print(f"{self.what}: {self.done}/{self.total} {self.unit}s{eta} {note}".rstrip(), flush=True)


def format_seconds(seconds: float) -> str:
    """``42 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def table(rows: list[dict[str, object]]) -> str:
    """Rows as an aligned text table; the first row's keys are the columns, floats get three digits."""
    if not rows:
        return "(none)"
    cells = [[str(column) for column in rows[0]]]
    cells += [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    numeric = [isinstance(v, int | float) for v in rows[0].values()]
    aligned = [
        "  ".join(
            c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([aligned[0], "  ".join("-" * w for w in widths), *aligned[1:]])
