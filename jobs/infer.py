"""Segment every NIfTI volume under a URI; masks are written back on each scan's own grid.

    python jobs/infer.py --model s3://scans/runs/spleen --input s3://scans/Task09_Spleen/imagesTs \
        --output s3://scans/masks

`--model` is a run's folder or a model file; `--input` a folder, a prefix or one file. Each scan gets
<output>/<case>_seg.nii.gz and a JSON with volumes and provenance. Exit codes: 0 every scan has its mask,
1 failed, 2 wrong command or input, 3 some scans have a verdict instead of a mask.
"""

from segcloud import cli


def main() -> int:
    """Parse, infer, print the table."""
    parser = cli.parser(__doc__, with_config=False)
    parser.add_argument("--model", required=True, metavar="URI", help="a run's folder or a model file")
    parser.add_argument("--input", required=True, metavar="URI", help="scans: a folder, a prefix or one file")
    parser.add_argument("--output", required=True, metavar="URI", help="where the masks go")
    parser.add_argument("--workers", type=int, default=1, help="actors, each with its model (default 1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default auto)")
    parser.add_argument("--cpus-per-worker", type=int, help="CPU cores of an actor (default: an equal share)")
    parser.add_argument("--verbose", action="store_true", help="show the actors' own output")
    args = parser.parse_args()

    from segcloud import cluster
    from segcloud.config import from_dict
    from segcloud.data.cases import raise_if_incomplete
    from segcloud.inference.batch import infer
    from segcloud.progress import table

    asked = {"workers": args.workers, "device": args.device, "cpus_per_worker": args.cpus_per_worker}
    compute = from_dict(
        {"compute": asked, "train": {"batch_size": max(args.workers, 1)}}, "--workers and so on"
    ).compute
    with cluster.connect(args.verbose):
        result = infer(args.model, args.input, args.output, compute)
    print(table(result.rows))
    print(f"\n{len(result.rows)} mask(s) in {args.output}, {len(result.verdicts)} case(s) without one")
    raise_if_incomplete(result.verdicts)
    return 0


if __name__ == "__main__":
    cli.main(main)
