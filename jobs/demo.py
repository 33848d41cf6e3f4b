"""The whole system on this machine: no arguments, no credentials, no network.

    python jobs/demo.py

Starts an embedded S3 server, fills a bucket with synthetic CT scans, trains by DDP on two Ray workers reading
from the bucket, segments held-out scans back into the bucket, scores them, and copies the run, its pictures and
the masks to ./segcloud-demo. The server, Ray and all temporary files are gone when it ends.
"""

import shutil
import tempfile
import time
from pathlib import Path

from segcloud import cli
from segcloud.config import load_config

CONFIG = Path(__file__).parent / "configs" / "demo.yaml"
TRAINING, HELD_OUT = 15, 4
GOAL = 0.85
"""Mean Dice on the held-out scans below which the demo counts as failed."""


def main() -> int:
    """Make data, train, infer, evaluate, show."""
    parser = cli.parser(__doc__)
    parser.add_argument("--output", default="segcloud-demo", metavar="DIR", help="(default ./segcloud-demo)")
    args = parser.parse_intermixed_args()
    started = time.monotonic()

    from segcloud import cluster
    from segcloud.embedded_s3 import EmbeddedS3
    from segcloud.progress import format_seconds

    print("step 1 of 4: an S3 server, Ray, and synthetic CT scans in a bucket", flush=True)
    output = Path(args.output)
    with tempfile.TemporaryDirectory(prefix="sc-") as scratch, EmbeddedS3(bucket="demo") as s3:
        places = [
            f"data.uri={s3.uri('scans')}",
            f"run.uri={s3.uri('runs/spleen')}",
            f"prepare.cache_dir={scratch}/cache",
        ]
        config = load_config(args.config or str(CONFIG), [*places, *args.overrides])
        _fill_bucket(Path(scratch) / "scans", config.data.uri)
        with cluster.connect(temp_dir=f"{scratch}/ray"):
            mean = _train_and_infer(config, s3.uri("masks"), output)
    print(
        f"\nsaved to {output}/: run/learning_curves.png, run/panels/, masks/, panels/ of the held-out scans"
    )
    print(f"held-out mean Dice {mean:.3f} (goal {GOAL}), {format_seconds(time.monotonic() - started)} in all")
    print(
        "next: your own scans, python jobs/train.py data.uri=s3://BUCKET/DATASET run.uri=s3://BUCKET/runs/NAME"
    )
    return 0 if mean >= GOAL else 1


def _fill_bucket(folder: Path, uri: str) -> None:
    from segcloud import storage
    from segcloud.progress import Progress
    from segcloud.synthetic import write_dataset

    paths = write_dataset(folder, TRAINING, HELD_OUT, seed=0)
    with Progress("upload", len(paths), "file") as progress:
        for path in paths:
            storage.put(path, storage.join(uri, *path.relative_to(folder).parts))
            progress.advance()


def _train_and_infer(config, masks_uri: str, output: Path) -> float:
    from segcloud import storage
    from segcloud.data.cases import raise_if_incomplete
    from segcloud.inference.batch import infer
    from segcloud.training.trainer import train

    print("\nstep 2 of 4: prepare the scans and train on two workers", flush=True)
    run = train(config)
    print("\nstep 3 of 4: segment the held-out scans from bucket to bucket", flush=True)
    images = storage.join(config.data.uri, "imagesTs")
    segmented = infer(run.run_uri, images, masks_uri, config.compute)
    raise_if_incomplete(segmented.verdicts)
    print("\nstep 4 of 4: evaluate on the scans' own grids", flush=True)
    for name in ("run", "masks", "panels"):  # of an earlier demo; whatever else is in the folder stays
        shutil.rmtree(output / name, ignore_errors=True)
    mean = _evaluate(config, segmented.rows, output)
    for source, name in ((run.run_uri, "run"), (masks_uri, "masks")):
        for info in storage.list_objects(source):
            relative = info.uri.removeprefix(source).strip("/")
            if not relative.startswith(("checkpoints/", "ray/")):
                storage.fetch(info.uri, output / name / relative)
    return mean


def _evaluate(config, segmented: list[dict], output: Path) -> float:
    from segcloud import storage
    from segcloud.data import nifti
    from segcloud.evaluation.metrics import finite_mean, score
    from segcloud.progress import table
    from segcloud.report.panels import draw_panel

    (output / "panels").mkdir(parents=True, exist_ok=True)
    rows = []
    for case, mask_uri in ((row["case"], row["mask"]) for row in segmented):
        image, truth = (
            nifti.decode(storage.read(storage.join(config.data.uri, folder, f"{case}.nii.gz")))
            for folder in ("imagesTs", "labelsTs")
        )
        mask = nifti.decode(storage.read(mask_uri)).array
        rows.append({"case": case, **score(truth.array, mask, config.data.labels, truth.affine)})
        picture = draw_panel(
            *(image.array, truth.array, mask, image.spacing),
            **{"affine": image.affine, "case": case, "dice": rows[-1]["dice_spleen"]},
        )
        (output / "panels" / f"{case}.png").write_bytes(picture)
    print(table(rows))
    return finite_mean(row["dice_spleen"] for row in rows)


if __name__ == "__main__":
    cli.main(main)
