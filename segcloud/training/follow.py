"""Following the workers from the driver: what rank 0 posts reaches a listener, in order.

Ray's own streaming of worker output prefixes and reorders lines, and reports of metrics come without resume
and warnings; a small actor between them carries both.
"""

import threading
from typing import Protocol

import ray

from segcloud.progress import Progress, format_seconds
from segcloud.training.loop import Row

POLL_S = 0.3


class Listener(Protocol):
    """Hears what the workers post, on the driver, in order."""

    def line(self, text: str) -> None:
        """A line for the user."""

    def resumed(self, done: int, best: Row | None) -> None:
        """Training continues after `done` epochs."""

    def epoch(self, row: Row) -> None:
        """An epoch is finished, and in a trial its checkpoint is stored."""

    def close(self) -> None:
        """The workers have ended."""


@ray.remote(num_cpus=0)
class Board:
    """Carries the workers' progress to the driver, without the prefixes and order of Ray's log streaming."""

    def __init__(self) -> None:
        self._items: list[tuple[str, tuple]] = []

    def post(self, item: tuple[str, tuple]) -> None:
        """Add the name of a listener's method and its arguments."""
        self._items.append(item)

    def drain(self) -> list[tuple[str, tuple]]:
        """Take everything posted so far."""
        items, self._items = self._items, []
        return items


class Follower:
    """A thread on the driver that hands what the workers post to a listener."""

    def __init__(self, board: ray.actor.ActorHandle, listener: Listener):
        self.board, self.listener = board, listener
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        self.listener.close()

    def _run(self) -> None:
        while True:
            last = self._stop.wait(POLL_S)
            try:
                items = ray.get(self.board.drain.remote(), timeout=5)
            except ray.exceptions.GetTimeoutError:
                items = []  # a busy machine; the next poll brings them
            except ray.exceptions.RayError:
                return
            for kind, arguments in items:
                getattr(self.listener, kind)(*arguments)
            if last:
                return


class Terminal:
    """A listener that shows a bar or lines: one per epoch.

    Args:
        epochs: ``train.epochs``.
    """

    def __init__(self, epochs: int):
        self.epochs = epochs
        self.progress = Progress("train", epochs, "epoch")
        self.best: Row | None = None

    def line(self, text: str) -> None:
        """Print it."""
        self.progress.line(text)

    def resumed(self, done: int, best: Row | None) -> None:
        """Say so, and count from there."""
        self.best = best
        self.progress.line(f"resuming after epoch {done} from the last checkpoint")
        self.progress.start_at(done)

    def epoch(self, row: Row) -> None:
        """Print loss, Dice, best and seconds by phase."""
        text = f"epoch {row['epoch']}/{self.epochs}  loss {row['loss']:.4f}"
        if row["val_dice"] is not None:
            if self.best is None or row["val_dice"] > self.best["val_dice"]:
                self.best = row
            text += f"  Dice {row['val_dice']:.4f}  IoU {row['val_iou']:.4f}"
            text += f"  best {self.best['val_dice']:.4f} at {self.best['epoch']}"
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["phases"].items())
        left = format_seconds((self.epochs - row["epoch"]) * row["seconds"])
        self.progress.line(f"{text}  {row['seconds']:.1f} s ({phases})  {left} left")
        self.progress.advance(quiet=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.progress.__exit__(None, None, None)
