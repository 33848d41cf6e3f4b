"""Train a segmentation model from scans in object storage or a folder.

On a laptop:
    python jobs/train.py --config jobs/configs/spleen.yaml data.uri=./Task09_Spleen run.uri=./runs/spleen

From and to a bucket, two GPU workers, on the cluster that RAY_ADDRESS names:
    python jobs/train.py data.uri=s3://scans/Task09_Spleen run.uri=s3://scans/runs/spleen compute.workers=2

As a submitted job:
    ray job submit --working-dir . -- python jobs/train.py data.uri=s3://... run.uri=s3://...

The same command continues an interrupted run. Exit codes: 0 done, 1 failed, 2 wrong command, config or
dataset (nothing was trained), 3 done with cases left out (data.bad_cases=skip).
"""

from segcloud import cli
from segcloud.config import load_config


def main() -> int:
    """Parse, train, print where everything is."""
    parser = cli.parser(__doc__)
    parser.add_argument("--verbose", action="store_true", help="show the workers' own output")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)

    from segcloud import cluster
    from segcloud.data.cases import raise_if_incomplete
    from segcloud.progress import table
    from segcloud.training.trainer import train

    with cluster.connect(args.verbose):
        result = train(config)
    epoch = result.best["epoch"] if result.best else "last"
    print(f"\nvalidation cases on their own grids, best model (epoch {epoch}):")
    print(table(result.native))
    print(f"\nmodel, history, curves and panels: {result.run_uri}")
    print(f"next: python jobs/infer.py --model {result.run_uri} --input URI --output URI")
    raise_if_incomplete(result.verdicts)
    return 0


if __name__ == "__main__":
    cli.main(main)
