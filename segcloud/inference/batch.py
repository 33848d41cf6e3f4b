"""Ray Data around the predictor: every volume under a URI gets a mask on its own grid, written back.

Only keys travel between Ray's tasks, never volumes. A case that fails gets a verdict and the batch goes on; a
mask is one object, put whole, so that a killed job leaves no partial one.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.util.annotations import RayDeprecationWarning

from segcloud import __version__, cluster, storage
from segcloud.config import ComputeConfig
from segcloud.data import nifti
from segcloud.data.cases import MASK_SUFFIX, Case, Verdict, find_images
from segcloud.data.nifti import BadScan
from segcloud.errors import SegcloudError, describe_failure, last_line
from segcloud.evaluation.metrics import volume_ml
from segcloud.inference.predictor import Predictor
from segcloud.model.checkpoint import Model, load_model
from segcloud.progress import Progress

ACTOR_RESTARTS = 2
"""Starts of an actor again, after which a scan that kills it ends the job."""


class InferenceError(SegcloudError):
    """The batch stopped before its end."""


@dataclass(frozen=True)
class InferResult:
    """What a batch did.

    Attributes:
        rows: per segmented case: case, mask URI, volume in mL and voxels per organ, seconds.
        verdicts: per other case, the reason.
    """

    rows: list[dict[str, Any]]
    verdicts: list[Verdict]


def infer(model_uri: str, input_uri: str, output_uri: str, compute: ComputeConfig) -> InferResult:
    """Segment every volume under `input_uri`. Needs a connected Ray.

    Args:
        model_uri: a run's folder or a model file.
        input_uri: a folder, a prefix or one file.
        output_uri: masks go to ``<output>/<case>_seg.nii.gz``, beside each a JSON with its provenance.
        compute: number of actors and their resources.

    Raises:
        UsageError: no input, or the cluster is too small.
        ModelError: the model cannot be loaded.
        StorageError: input or output cannot be reached.
        InferenceError: actors cannot start, or die again and again.
    """
    model_uri, input_uri, output_uri = map(storage.absolute, (model_uri, input_uri, output_uri))
    cluster.refuse_temporary(output_uri)
    wanted = cluster.acquire(compute)
    model = load_model(model_uri)  # fail here rather than in every actor
    cases = find_images(input_uri, output_uri)
    storage.check_writable(output_uri)
    print(
        f"model: {model.uri} ({_describe(model)})\ninfer: {len(cases)} volume(s), {compute.workers} actor(s)",
        flush=True,
    )
    rows, verdicts = [], []
    with Progress("infer", len(cases), "case") as progress:
        try:
            for row in _run(cases, model.uri, output_uri, compute.workers, wanted):
                if row["code"]:
                    verdicts.append(Verdict(row["case"], row["code"], row["message"], row["image"]))
                    progress.line(verdicts[-1].line())
                else:
                    rows.append(json.loads(row["result"]))
                progress.advance(note=row["case"])
        except ray.exceptions.RayError as error:
            raise InferenceError(
                f"inference stopped after {progress.done} of {len(cases)} case(s): {type(error).__name__}: "
                f"{last_line(error)}; the masks so far are whole; check the workers' memory and AWS settings "
                "(--verbose shows their output), then run again"
            ) from error
    order = {case.id: i for i, case in enumerate(cases)}
    return InferResult(
        sorted(rows, key=lambda r: order[r["case"]]), sorted(verdicts, key=lambda v: order[v.case])
    )


def _describe(model: Model) -> str:
    dice = model.info.get("val_dice")
    return (
        f"epoch {model.info.get('epoch')}, validation Dice {dice:.4f}"
        if dice is not None
        else "no Dice known"
    )


def _run(
    cases: list[Case], model_uri: str, output_uri: str, workers: int, wanted: dict[str, float]
) -> Iterator[dict[str, Any]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # segcloud's own, which counts cases
    items = [{"case": case.id, "image": case.image} for case in cases]
    workers = min(workers, len(cases))
    dataset = ray.data.from_items(items, override_num_blocks=len(items))  # one case per task: unit of retry
    with warnings.catch_warnings():
        # named parameters are to replace these in Ray 2.64; 2.60, which is pinned, has none for restarts
        warnings.simplefilter("ignore", RayDeprecationWarning)
        mapped = dataset.map_batches(
            _Segmenter,
            fn_constructor_kwargs={
                "model_uri": model_uri,
                "output_uri": output_uri,
                "wanted": wanted,
            },
            batch_size=1,
            num_cpus=wanted["CPU"],
            num_gpus=wanted.get("GPU"),
            compute=ray.data.ActorPoolStrategy(min_size=workers, max_size=workers),
            udf_modifying_row_count=False,
            # a scan that kills its actor would be tried without end: Ray Data's default is to retry for ever
            max_restarts=ACTOR_RESTARTS,
            max_task_retries=ACTOR_RESTARTS,
        )
    return mapped.iter_rows()


class _Segmenter:
    """One actor: loads the model once, then segments case by case."""

    def __init__(self, model_uri: str, output_uri: str, wanted: dict[str, float]):
        torch.set_num_threads(int(wanted["CPU"]))
        device = torch.device("cuda" if "GPU" in wanted else "cpu")
        self.model = load_model(model_uri)
        self.predictor = Predictor(self.model.network, self.model.config, device)
        self.output_uri = output_uri

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        case, image = str(batch["case"][0]), str(batch["image"][0])
        code = message = result = ""
        try:
            result = json.dumps(self._segment(case, image))
        except BadScan as bad:
            code, message = bad.code, bad.message
        except storage.StorageError as error:
            code, message = "storage", str(error)
        except Exception as error:  # a bug or lack of memory on one scan must not stop the batch
            code, message = "failed", describe_failure(error)
        return {"case": [case], "image": [image], "code": [code], "message": [message], "result": [result]}

    def _segment(self, case: str, image: str) -> dict[str, Any]:
        info = storage.stat(image)
        volume = nifti.decode(storage.read(image))
        mask = self.predictor.segment(volume)
        config = self.model.config
        provenance = {
            "source": image,
            "source-etag": info.etag if info else "",
            "model": self.model.uri,
            "model-sha256": self.model.digest,
            "segcloud": __version__,
        }
        target = storage.join(self.output_uri, case + MASK_SUFFIX)
        storage.put(
            nifti.encode_mask(mask, volume), target, metadata=provenance, content_type="application/gzip"
        )
        row: dict[str, Any] = {"case": case, "mask": target}
        for organ, value in config.data.labels.items():
            found = mask == value
            row |= {f"voxels_{organ}": int(found.sum()), f"ml_{organ}": volume_ml(found, volume.affine)}
        sidecar = row | {"labels": config.data.labels, "shape": list(mask.shape), "provenance": provenance}
        storage.put_json(sidecar, storage.join(self.output_uri, case + "_seg.json"))
        return row
