"""Small builders that the tests share."""

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from segcloud.config import Config, from_dict
from segcloud.data.nifti import Volume, decode
from segcloud.synthetic import make_phantom, save_nifti

REAL_DATA = Path(
    os.environ.get("SEGCLOUD_REAL_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
)
needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "spleen_ct").is_dir(),
    reason=f"real scans are not at {REAL_DATA}; set SEGCLOUD_REAL_DATA to their folder",
)

# A network and windows that train in a blink; the code paths are those of a real run.
TINY: dict[str, Any] = {
    "prepare": {"spacing": [8, 8, 8], "cache_gb": 1},
    "model": {"channels": [4, 8], "strides": [2], "num_res_units": 1},
    "data": {"split": {"n": 1}},
    "train": {
        "epochs": 2,
        "batch_size": 4,
        "samples_per_case": 2,
        "roi_size": [16, 16, 16],
        "checkpoint_every": 1,
        "precision": "fp32",
    },
    "validation": {"every": 1, "roi_size": [16, 16, 16], "panels": 1},
    "compute": {"device": "cpu", "cpus_per_worker": 1},
}


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with nested `changes`; neither is modified."""
    out = dict(base)
    for key, value in changes.items():
        out[key] = (
            merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
        )
    return out


def tiny_config(**sections: dict[str, Any]) -> Config:
    """The tiny config with some sections' fields changed."""
    return from_dict(merge(TINY, sections))


def overrides(config: Config) -> list[str]:
    """A config as the command-line overrides that make it."""
    import json

    def walk(values: dict[str, Any], prefix: str = "") -> list[str]:
        lines = []
        for key, value in values.items():
            if isinstance(value, dict) and key not in ("labels", "space"):
                lines += walk(value, f"{prefix}{key}.")
            else:
                lines.append(f"{prefix}{key}={json.dumps(value)}")
        return lines

    return walk(config.to_dict())


def write_cases(folder: Path, count: int, spacing: float = 8.0) -> Path:
    """`count` coarse phantoms in the Medical Decathlon layout."""
    for index in range(count):
        phantom = make_phantom(index, spacing=(spacing,) * 3)
        save_nifti(folder / "imagesTr" / f"case_{index}.nii.gz", phantom.image, phantom.affine)
        save_nifti(folder / "labelsTr" / f"case_{index}.nii.gz", phantom.label, phantom.affine)
    return folder


def as_volume(array: np.ndarray, affine: np.ndarray) -> Volume:
    """An array as if it had been read from a file."""
    return decode(nib.Nifti1Image(array, affine).to_bytes())


def phantom_volumes(seed: int = 0, **kwargs: Any) -> tuple[Volume, Volume]:
    """Image and label map of a phantom."""
    phantom = make_phantom(seed, **kwargs)
    return as_volume(phantom.image, phantom.affine), as_volume(phantom.label, phantom.affine)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Plain Dice of two boolean masks."""
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))
