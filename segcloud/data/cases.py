"""Which cases a dataset has, how image and label pair, and who trains and who validates.

Two layouts under one URI: the Medical Decathlon's (``imagesTr/``, ``labelsTr/``, optional ``imagesTs/``) and
a MONAI-style datalist JSON. Case ids come from file names, made safe as object keys.
"""

import contextlib
import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from segcloud import storage
from segcloud.config import DataConfig, SplitConfig
from segcloud.data.nifti import SUFFIXES, stem
from segcloud.errors import EXIT_INCOMPLETE, UsageError

MASK_SUFFIX = "_seg.nii.gz"
"""What inference appends to a case's name."""


class DatasetError(UsageError):
    """The dataset as a whole cannot be used: no cases, a bad datalist, or a split with an empty side."""


@dataclass(frozen=True)
class Case:
    """One scan and, for training, its label map.

    Attributes:
        id: the file's name made safe as an object key, unique in the dataset. It appears in outputs and logs:
            files must be named pseudonymously.
        image: URI of the image.
        label: URI of the label map; None for scans to segment.
        patient: scans of one patient stay on one side of a split.
        fold: fold number from a datalist, if it gives one.
        validation: listed under a datalist's ``validation``.
    """

    id: str
    image: str
    label: str | None = None
    patient: str = ""
    fold: int | None = None
    validation: bool = False


@dataclass(frozen=True)
class Verdict:
    """What was decided about a case that could not be used.

    Attributes:
        case: case id.
        code: short reason, e.g. ``grid_mismatch``.
        message: what was found and the remedy.
        uri: the file it is about.
    """

    case: str
    code: str
    message: str
    uri: str

    def line(self) -> str:
        """One line for a log or a terminal."""
        return f"{self.case}: [{self.code}] {self.message} ({self.uri})"


class BadCasesError(UsageError):
    """Some cases cannot be used and ``data.bad_cases`` is ``refuse``."""

    def __init__(self, verdicts: Sequence[Verdict]):
        lines = "\n".join(f"  {v.line()}" for v in verdicts)
        super().__init__(
            f"{len(verdicts)} bad case(s); mend them, or set data.bad_cases=skip to go on without:\n{lines}"
        )
        self.verdicts = list(verdicts)


class IncompleteError(UsageError):
    """The job ended, with some cases left out."""

    exit_code = EXIT_INCOMPLETE


@dataclass
class Dataset:
    """Cases that pair up, and verdicts for those that do not."""

    cases: list[Case]
    verdicts: list[Verdict] = field(default_factory=list)


def safe_id(text: str) -> str:
    """A name that is safe as a file name and object key; changed names get a short hash to stay distinct."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-")[:80] or "case"
    if safe == text:
        return safe
    return f"{safe}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def find_images(uri: str, output: str | None = None) -> list[Case]:
    """Every NIfTI volume below a URI, or the one file it names, as cases without labels.

    Args:
        uri: a folder, a prefix or one file. Hidden files are passed over.
        output: where results go; what lies there is no input, save where it is the input's own folder.

    Raises:
        DatasetError: there is none.
        StorageError: the place cannot be listed.
    """
    own = output if output and output.rstrip("/") != uri.rstrip("/") else None
    found = [
        image
        for image in _volumes(uri)
        if not (own and image.startswith(own.rstrip("/") + "/")) and not (output and _is_mask(image))
    ]
    if not found:
        raise DatasetError(f"{uri}: no .nii.gz or .nii file found; check the URI, or convert DICOM first")
    folder = storage.parent(uri) if found == [uri] else uri
    paths = [image.removeprefix(folder).strip("/") for image in found]
    # names must not become one case: the shortest of file name, path and path with suffix that tells them apart
    for name_of in (lambda p: stem(storage.name(p)), stem, str):
        names = [name_of(path) for path in paths]
        if len(set(names)) == len(names):
            break
    return [Case(safe_id(name), image, patient=name) for name, image in zip(names, found, strict=True)]


def _is_mask(uri: str) -> bool:
    return storage.name(uri).endswith(MASK_SUFFIX)


def _volumes(uri: str) -> list[str]:
    """URIs of the volumes below a place; macOS archives bring a hidden ``._name`` beside each."""
    found = storage.list_objects(uri, suffix=SUFFIXES)
    return [info.uri for info in found if not storage.name(info.uri).startswith(".")]


def load_dataset(config: DataConfig) -> Dataset:
    """Find the labelled cases of ``data.uri``.

    Raises:
        DatasetError: nothing to train on, or the datalist is not usable.
        StorageError: bucket missing, access denied and the like.
    """
    if not config.uri:
        raise DatasetError("data.uri is not set; pass data.uri=s3://bucket/prefix or a folder")
    dataset = _from_datalist(config) if config.datalist else _from_decathlon(config.uri)
    if not dataset.cases and not dataset.verdicts:
        raise DatasetError(
            f"{config.uri}: no labelled case found; expected imagesTr/ and labelsTr/ with .nii.gz files, "
            "or a data.datalist"
        )
    ids = [case.id for case in dataset.cases]
    doubles = sorted({i for i in ids if ids.count(i) > 1})
    if doubles:
        raise DatasetError(f"{config.datalist or config.uri}: case listed twice: {', '.join(doubles[:5])}")
    return dataset


def _from_decathlon(uri: str) -> Dataset:
    if not storage.is_s3(uri) and not any(True for _ in storage.list_objects(uri)):
        return Dataset([])
    sides = {side: _by_path(storage.join(uri, side)) for side in ("imagesTr", "labelsTr")}
    dataset = Dataset([])
    for name in sorted(sides["imagesTr"].keys() | sides["labelsTr"].keys()):
        images, labels = sides["imagesTr"].get(name, []), sides["labelsTr"].get(name, [])
        case = safe_id(name)
        if len(images) == len(labels) == 1:
            dataset.cases.append(Case(case, images[0], labels[0], patient=name))
        elif len(images) > 1 or len(labels) > 1:
            doubled = (images if len(images) > 1 else labels)[1]
            message = "both .nii and .nii.gz of one name; remove one of the two"
            dataset.verdicts.append(Verdict(case, "two_files", message, doubled))
        elif images:
            message = "image without a label; add labelsTr/ of the same name"
            dataset.verdicts.append(Verdict(case, "no_label", message, images[0]))
        else:
            message = "label without an image; add imagesTr/ of the same name"
            dataset.verdicts.append(Verdict(case, "no_image", message, labels[0]))
    return dataset


def _by_path(uri: str) -> dict[str, list[str]]:
    """Path below the folder, without suffix → the volumes of that name."""
    found: dict[str, list[str]] = {}
    with contextlib.suppress(storage.NotFoundError):
        for volume in _volumes(uri):
            found.setdefault(stem(volume.removeprefix(uri).strip("/")), []).append(volume)
    return found


def _from_datalist(config: DataConfig) -> Dataset:
    assert config.datalist  # noqa: S101 - for the type checker
    try:
        content = json.loads(storage.read(config.datalist))
        rows = [(row, False) for row in content["training"]]
        rows += [(row, True) for row in content.get("validation", [])]
        cases, verdicts = [], []
        for row, validation in rows:
            image = _resolve(config.uri, row["image"])
            case_id = safe_id(stem(storage.name(image)))
            if not row.get("label"):
                verdicts.append(Verdict(case_id, "no_label", "listed without a label; add one", image))
                continue
            label, patient = _resolve(config.uri, row["label"]), str(row.get("patient") or case_id)
            cases.append(Case(case_id, image, label, patient, _fold(row), validation))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError(
            f"{config.datalist}: not a datalist ({type(error).__name__}: {error}); "
            'expected {"training": [{"image": ..., "label": ..., "fold": 0, "patient": ...}]}'
        ) from None
    return Dataset(cases, verdicts)


def _resolve(base: str, path: str) -> str:
    if storage.is_s3(path) or path.startswith(("/", "file://")):
        return path
    return storage.join(base, *[part for part in path.split("/") if part not in ("", ".")])


def _fold(row: dict[str, Any]) -> int | None:
    return None if row.get("fold") is None else int(row["fold"])


def split_cases(cases: Sequence[Case], config: SplitConfig) -> tuple[list[Case], list[Case]]:
    """Training and validation cases.

    Raises:
        DatasetError: one side would be empty, or a patient would be on both.
    """
    training, validation = _SPLITS[config.kind](list(cases), config)
    if not training or not validation:
        raise DatasetError(
            f"split {config.kind}: {len(training)} training and {len(validation)} validation cases out of "
            f"{len(cases)}; change data.split"
        )
    both = {c.patient for c in training} & {c.patient for c in validation}
    if both and config.kind != "overfit":
        ids = sorted(c.id for c in cases if c.patient in both)
        raise DatasetError(
            f"split {config.kind}: a patient would be on both sides (cases {', '.join(ids[:5])}); "
            "use data.split.kind=folds, which splits by patient"
        )
    return training, validation


def _last_n(cases: list[Case], config: SplitConfig) -> tuple[list[Case], list[Case]]:
    return cases[: -config.n], cases[-config.n :]


def _folds(cases: list[Case], config: SplitConfig) -> tuple[list[Case], list[Case]]:
    patients = sorted({c.patient for c in cases})
    random.Random(config.seed).shuffle(patients)
    return _sides(cases, {p for i, p in enumerate(patients) if i % config.folds == config.fold})


def _listed(cases: list[Case], config: SplitConfig) -> tuple[list[Case], list[Case]]:
    held_out = [c.validation or c.fold == config.fold for c in cases]
    return (
        [c for c, out in zip(cases, held_out, strict=True) if not out],
        [c for c, out in zip(cases, held_out, strict=True) if out],
    )


def _sides(cases: list[Case], held_out: set[str]) -> tuple[list[Case], list[Case]]:
    return [c for c in cases if c.patient not in held_out], [c for c in cases if c.patient in held_out]


_SPLITS = {
    "last_n": _last_n,
    "folds": _folds,
    "listed": _listed,
    "overfit": lambda cases, config: (cases, cases),
}


def admit(dataset_verdicts: Iterable[Verdict], policy: str) -> list[Verdict]:
    """Apply ``data.bad_cases``: return the verdicts under ``skip``.

    Raises:
        BadCasesError: there are verdicts and the policy is ``refuse``.
    """
    verdicts = list(dataset_verdicts)
    if verdicts and policy == "refuse":
        raise BadCasesError(verdicts)
    return verdicts


def raise_if_incomplete(verdicts: list[Verdict]) -> None:
    """Raise the error that ends a job with exit code 3 where cases were left out."""
    if verdicts:
        lines = "\n".join(f"  {v.line()}" for v in verdicts)
        raise IncompleteError(f"done, but {len(verdicts)} case(s) were left out:\n{lines}")
