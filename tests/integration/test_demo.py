"""The demo as a new user runs it, with Ray and S3 of its own."""

import re
import sys
from subprocess import run

import pytest

from tests.integration.conftest import REPOSITORY


@pytest.mark.slow
@pytest.mark.ray
def test_the_demo_reaches_its_goal_and_leaves_only_its_output(tmp_path):
    before = {p.name for p in REPOSITORY.iterdir()}
    done = run(
        [sys.executable, "jobs/demo.py", "--output", tmp_path / "out"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(re.search(r"held-out mean Dice ([\d.]+)", done.stdout)[1]) >= 0.85
    for name in ("run/learning_curves.png", "run/best_model.safetensors", "masks/phantom_015_seg.nii.gz"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert len(list((tmp_path / "out" / "panels").glob("*.png"))) == 4
    assert {p.name for p in REPOSITORY.iterdir()} == before
