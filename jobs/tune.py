"""Search learning rate and ROI size (or any fields) over full training runs, and hand back a config that trains.

    python jobs/tune.py data.uri=s3://scans/Task09_Spleen run.uri=s3://scans/sweeps/spleen --samples 12
    python jobs/train.py --config s3://scans/sweeps/spleen/best.yaml

The search space is `tune.space` in the config. The same command continues an interrupted sweep and keeps its
finished trials. Exit codes: 0 done (failed trials are listed), 1 no trial has a result, 2 wrong command, config
or dataset, 3 done with cases left out.
"""

from segcloud import cli
from segcloud.config import load_config


def main() -> int:
    """Parse, search, print the table."""
    parser = cli.parser(__doc__)
    parser.add_argument("--samples", type=int, help="same as tune.samples=N")
    parser.add_argument("--max-concurrent", type=int, help="same as tune.max_concurrent=K")
    parser.add_argument("--scheduler", choices=("asha", "none", "pbt"), help="same as tune.scheduler=...")
    parser.add_argument("--search", choices=("random", "optuna"), help="same as tune.search=...")
    parser.add_argument("--verbose", action="store_true", help="show the trials' own output")
    args = parser.parse_intermixed_args()
    flags = ("samples", "max_concurrent", "scheduler", "search")
    given = [f"tune.{flag}={getattr(args, flag)}" for flag in flags if getattr(args, flag) is not None]
    config = load_config(args.config, [*args.overrides, *given])

    from segcloud import cluster
    from segcloud.data.cases import raise_if_incomplete
    from segcloud.progress import table
    from segcloud.report.sweep import format_value
    from segcloud.training.tuning import tune

    with cluster.connect(args.verbose, dashboard=True):
        result = tune(config)
    print("\ntrials, the best first (Dice on the validation cases, best of each trial):")
    rows = [
        {
            "trial": trial["trial"],
            **{path: format_value(value) for path, value in trial["params"].items()},
            "Dice": "-" if trial["val_dice"] is None else f"{trial['val_dice']:.3f}",
            "status": trial["status"],
            "reason": trial["reason"],
        }
        for trial in result.trials
    ]
    print(table(rows))
    for path, value, reason in result.left_out:
        print(f"left out of the search: {path}={format_value(value)}: {reason}")
    failed = sum(trial["status"] == "failed" for trial in result.trials)
    if failed:
        print(f"warning: {failed} trial(s) failed, see the reasons above")
    print(f"\ntrials.csv, sweep.png and best.yaml: {config.run.uri}")
    print(f"next: python jobs/train.py --config {result.best_config}")
    raise_if_incomplete(result.verdicts)
    return 0


if __name__ == "__main__":
    cli.main(main)
