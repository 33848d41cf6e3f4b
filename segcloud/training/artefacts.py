"""What a run leaves for people to look at: history, curves, TensorBoard events, panels.

Everything is rewritten whole from the history in the checkpoint, so that a resumed run leaves one continuous
record whatever was uploaded before it was killed.
"""

import csv
import io
import tempfile
import time
from pathlib import Path

from tensorboardX import SummaryWriter

from segcloud import storage
from segcloud.report.curves import draw_learning_curves
from segcloud.training.loop import Row

CURVES_EVERY_S = 30.0
"""Seconds between redrawings while training: a picture takes a third of a second of a core."""
EVENTS_NAME = "events.out.tfevents.0000000000.segcloud"


def history_csv(history: list[Row]) -> bytes:
    """The history as CSV, one row per epoch, phases as columns ``seconds_<phase>``."""
    flat = [
        {k: v for k, v in row.items() if k != "phases"}
        | {f"seconds_{k}": v for k, v in row["phases"].items()}
        for row in history
    ]
    columns = list(dict.fromkeys(column for row in flat for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue().encode()


def event_file(history: list[Row]) -> bytes:
    """A TensorBoard event file of the whole history."""
    with tempfile.TemporaryDirectory(prefix="segcloud-events-") as folder:
        with SummaryWriter(folder) as writer:
            for row in history:
                for tag, name in (("loss/train", "loss"), ("dice/validation", "val_dice"), ("lr", "lr")):
                    _scalar(writer, tag, row[name], row["epoch"])
                _scalar(writer, "iou/validation", row["val_iou"], row["epoch"])
                for phase, seconds in row["phases"].items():
                    _scalar(writer, f"seconds/{phase}", seconds, row["epoch"])
        (written,) = Path(folder).iterdir()
        return written.read_bytes()


def _scalar(writer: SummaryWriter, tag: str, value: float | None, epoch: int) -> None:
    if value is not None:
        writer.add_scalar(tag, value, epoch)


class RunRecord:
    """Keeps ``history.csv``, ``learning_curves.png`` and the events of a run up to date.

    Args:
        run_uri: the run's folder.
        title: of the curves.
    """

    def __init__(self, run_uri: str, title: str):
        self.run_uri, self.title = run_uri, title
        self._drawn = 0.0

    def write(self, history: list[Row], final: bool = False) -> None:
        """Write all three; the picture at most every :data:`CURVES_EVERY_S` seconds unless `final`."""
        storage.put(history_csv(history), storage.join(self.run_uri, "history.csv"))
        if not final and time.monotonic() - self._drawn < CURVES_EVERY_S:
            return
        self._drawn = time.monotonic()
        storage.put(event_file(history), storage.join(self.run_uri, "tensorboard", EVENTS_NAME))
        picture = draw_learning_curves(history, self.title)
        storage.put(picture, storage.join(self.run_uri, "learning_curves.png"), content_type="image/png")
