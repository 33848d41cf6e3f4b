"""One typed config for every job.

Order of precedence: defaults in this file < the YAML file < ``key=value`` overrides on the command line
(``train.lr=1e-3``, values in YAML syntax). The defaults are the *fast* recipe. Objects are frozen and
validated at construction; :class:`ConfigError` names the dotted path, what was expected and the nearest
valid name.
"""

import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from segcloud import storage
from segcloud.errors import UsageError

Size3 = tuple[int, int, int]


PLACES = {"data": ("uri", "datalist"), "prepare": ("uri", "cache_dir"), "run": ("uri",)}
"""Fields that name storage: made absolute where they are local paths, and no part of a model."""


class ConfigError(UsageError):
    """The config has an unknown key or a bad value; the message holds one line per problem."""


class Section(BaseModel):
    """Base of all config sections: unknown keys are errors, objects are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitConfig(Section):
    """Which cases train and which validate. No patient is ever on both sides, save under `overfit`."""

    kind: Literal["last_n", "folds", "listed", "overfit"] = Field(
        "last_n",
        description="last_n: the last `n` cases by name validate (the article); folds: k-fold by patient; "
        "listed: the datalist's own `fold` numbers or `validation` list; overfit: every case on both sides, "
        "to prove a pipeline, never to report a result",
    )
    n: int = Field(9, ge=1, description="last_n: number of validation cases")
    folds: int = Field(5, ge=2, description="folds: number of folds k")
    fold: int = Field(0, ge=0, description="folds and listed: index of the fold that validates")
    seed: int = Field(0, ge=0, description="folds: seed of the shuffle of patients")


class DataConfig(Section):
    """The dataset."""

    uri: str = Field("", description="dataset root: s3://bucket/prefix or a folder, Medical Decathlon layout")
    datalist: str | None = Field(
        None,
        description="URI of a MONAI-style datalist JSON (training: [{image, label, fold, patient}]); "
        "its relative paths start at data.uri",
    )
    labels: dict[str, int] = Field(
        {"spleen": 1},
        description="organ name: value in the label maps; every other value becomes background",
    )
    split: SplitConfig = SplitConfig()
    bad_cases: Literal["refuse", "skip"] = Field(
        "refuse",
        description="refuse: any bad case stops the job before the first step, after all were checked; "
        "skip: go on without them, list them, and end with exit code 3",
    )

    @field_validator("labels")
    @classmethod
    def _labels(cls, labels: dict[str, int]) -> dict[str, int]:
        if not labels:
            raise ValueError("needs at least one organ, e.g. {spleen: 1}")
        if any(not 1 <= v <= 255 for v in labels.values()) or len(set(labels.values())) < len(labels):
            raise ValueError("needs distinct label values between 1 and 255 (masks are uint8)")
        return labels


class PrepareConfig(Section):
    """Deterministic transforms, done once per case: window, foreground crop, orientation, spacing."""

    window: tuple[float, float] = Field((-57.0, 164.0), description="HU mapped to 0 and 1; clipped outside")
    crop_foreground: bool = Field(True, description="crop to the voxels above the lower end of the window")
    orientation: str = Field("RAS", description="axis codes of the prepared grid")
    spacing: tuple[float, float, float] = Field((1.5, 1.5, 2.0), description="mm per voxel along x, y, z")
    dtype: Literal["float16", "uint8"] = Field(
        "float16", description="storage of the 0..1 image: float16 (error ≤ 2^-12) or uint8 (error ≤ 1/510)"
    )
    uri: str | None = Field(
        None,
        description="where prepared volumes are kept and shared by runs; default: `prepared/` beside run.uri",
    )
    cache_dir: str | None = Field(
        None, description="node-local copy; default: $SEGCLOUD_CACHE or ~/.cache/segcloud"
    )
    cache_gb: float = Field(
        50.0, gt=0, description="GB; budget of the node-local copy, oldest use leaves first"
    )

    @field_validator("window")
    @classmethod
    def _window(cls, window: tuple[float, float]) -> tuple[float, float]:
        if not window[0] < window[1]:
            raise ValueError("needs (low, high) in HU with low < high")
        return window

    @field_validator("spacing")
    @classmethod
    def _spacing(cls, spacing: tuple[float, float, float]) -> tuple[float, float, float]:
        if not all(0.1 <= s <= 20 for s in spacing):
            raise ValueError("needs three values between 0.1 and 20 mm")
        return spacing

    @field_validator("orientation")
    @classmethod
    def _orientation(cls, codes: str) -> str:
        axes = [{"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}.get(c) for c in codes.upper()]
        if sorted(a for a in axes if a is not None) != [0, 1, 2] or len(axes) != 3:
            raise ValueError("needs three axis codes such as RAS or LPS")
        return codes.upper()


class ModelConfig(Section):
    """MONAI's 3D UNet."""

    channels: tuple[int, ...] = Field((16, 32, 64, 128, 256), description="features per level")
    strides: tuple[int, ...] = Field((2, 2, 2, 2), description="downsampling between levels")
    num_res_units: int = Field(2, ge=0, description="residual units per level")
    norm: Literal["batch", "instance"] = Field("batch", description="normalisation layer")
    sync_batch_norm: bool = Field(
        True,
        description="batch statistics over all workers, so that the number of workers changes nothing",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout probability; its masks differ with the number of workers"
    )

    @model_validator(mode="after")
    def _levels(self) -> "ModelConfig":
        if len(self.strides) != len(self.channels) - 1:
            raise ValueError(
                f"strides needs one value fewer than channels: {len(self.channels)} channels need "
                f"{len(self.channels) - 1} strides, got {len(self.strides)}"
            )
        if min(self.channels) < 1 or min(self.strides, default=1) < 1 or len(self.channels) < 2:
            raise ValueError("channels and strides need at least two levels of positive values")
        return self

    @property
    def stride(self) -> int:
        """Product of the strides: a window's edge must be a multiple of it."""
        return math.prod(self.strides)


class AugmentConfig(Section):
    """Random changes of a training patch; all off in the article's recipe."""

    flip: float = Field(0.0, ge=0, le=1, description="probability of a flip along each axis")
    scale: float = Field(0.0, ge=0, lt=1, description="intensity times 1 ± this")
    shift: float = Field(0.0, ge=0, lt=1, description="intensity plus 0 ± this (the window is 0..1)")


class TrainConfig(Section):
    """The recipe."""

    epochs: int = Field(300, ge=1, description="passes over the training cases")
    batch_size: int = Field(
        8,
        ge=1,
        description="patches per optimizer step over ALL workers; the learning rate belongs to this number "
        "and is not scaled with the number of workers",
    )
    samples_per_case: int = Field(4, ge=1, description="patches drawn from each case in an epoch")
    roi_size: Size3 = Field((96, 96, 96), description="voxels; edge lengths of a training patch")
    positive: float = Field(1.0, ge=0, description="weight of patches centred on an organ")
    negative: float = Field(1.0, ge=0, description="weight of patches centred on background")
    shuffle: Literal["patches", "cases"] = Field(
        "patches", description="cases: the patches of one case stay in one batch (the article)"
    )
    loss: Literal["dice", "dice_ce"] = Field("dice_ce", description="soft Dice, or soft Dice + cross-entropy")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adamw", description="sgd uses momentum 0.9, Nesterov")
    lr: float = Field(2e-3, gt=0, description="learning rate (peak of the schedule)")
    weight_decay: float = Field(1e-5, ge=0, description="weight decay")
    schedule: Literal["constant", "cosine"] = Field(
        "cosine", description="constant, or linear warm-up then a cosine to 0 over all epochs"
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="cosine: share of all steps that warms up")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="autocast; auto: bf16 where GPU or CPU computes it natively, else fp32",
    )
    channels_last: bool = Field(True, description="channels_last_3d memory format")
    augment: AugmentConfig = AugmentConfig()
    seed: int = Field(0, ge=0, description="seed of weights, patches and shuffles")
    checkpoint_every: int = Field(5, ge=1, description="epochs between checkpoints; the last is always kept")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints to keep")

    @model_validator(mode="after")
    def _weights(self) -> "TrainConfig":
        if self.positive + self.negative <= 0:
            raise ValueError("positive and negative cannot both be 0")
        return self


class ValidationConfig(Section):
    """Sliding-window validation on the prepared grid."""

    every: int = Field(5, ge=1, description="epochs between validations; the last epoch always validates")
    roi_size: Size3 = Field((96, 96, 96), description="voxels; edge lengths of a window, also used to infer")
    sw_batch_size: int = Field(4, ge=1, description="windows per forward pass")
    overlap: float = Field(0.25, ge=0, lt=1, description="share of a window that its neighbour covers too")
    panels: int = Field(6, ge=0, description="image | label | prediction pictures, worst cases first")


class TuneConfig(Section):
    """Search over any fields; every trial is a full training run."""

    space: dict[str, dict[str, list[Any]]] = Field(
        {
            "train.lr": {"loguniform": [1e-4, 1e-2]},
            "train.roi_size": {"choice": [[64, 64, 64], [96, 96, 96], [128, 128, 128]]},
        },
        description="dotted field: {loguniform: [low, high]}, {uniform: [low, high]}, {randint: [low, high)} "
        "or {choice: [values]}",
    )
    samples: int = Field(12, ge=1, description="trials")
    max_concurrent: int | None = Field(None, ge=1, description="trials at a time; default: as many as fit")
    scheduler: Literal["asha", "none", "pbt"] = Field(
        "asha",
        description="asha stops the worse half of the trials at a half and a quarter of the budget; pbt lets the "
        "worst continue from the best with changed numbers; none runs all to the end",
    )
    search: Literal["random", "optuna"] = Field("random", description="optuna: TPE, needs segcloud[tune]")
    budget_voxels: float | None = Field(
        None,
        gt=0,
        description="patch voxels that each trial may see, whatever its ROI and batch; default: what train.epochs "
        "at train.roi_size sees. Trials compare at equal voxels, which is equal computation",
    )
    checks: int = Field(8, ge=2, description="validations of a trial, evenly spread over its budget")
    seed: int = Field(0, ge=0, description="seed of the search")

    @field_validator("space")
    @classmethod
    def _space(cls, space: dict[str, dict[str, list[Any]]]) -> dict[str, dict[str, list[Any]]]:
        if not space:
            raise ValueError("needs at least one field to search")
        for path, domain in space.items():
            kind, values = next(iter(domain.items()), ("", []))
            if len(domain) != 1 or kind not in ("loguniform", "uniform", "randint", "choice"):
                raise ValueError(f"{path}: needs one of loguniform, uniform, randint or choice, got {domain}")
            numbers = kind == "choice" or (
                len(values) == 2 and all(isinstance(v, int | float) for v in values)
            )
            if not values or not numbers or (kind != "choice" and not values[0] < values[1]):
                raise ValueError(f"{path}: {kind} needs [low, high] with low < high, or values, got {values}")
            if kind == "loguniform" and values[0] <= 0:
                raise ValueError(f"{path}: loguniform needs a low above 0, got {values[0]}")
        return space


class ComputeConfig(Section):
    """What a job asks of the cluster."""

    workers: int = Field(1, ge=1, description="DDP workers (world size), or inference actors")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda where the cluster has GPUs"
    )
    cpus_per_worker: int | None = Field(
        None,
        ge=1,
        description="CPU cores of a worker and its torch threads; default: an equal share of the nodes",
    )
    max_failures: int = Field(3, ge=0, description="worker failures after which a training run gives up")
    wait_for_nodes: float = Field(
        0.0, ge=0, description="seconds to wait for an autoscaling cluster's nodes; 0: refuse at once"
    )


class RunConfig(Section):
    """Where the results go."""

    uri: str = Field("", description="this run's folder: s3://bucket/runs/name or a folder; reuse to resume")


class Config(Section):
    """Everything a job can be told."""

    data: DataConfig = DataConfig()
    prepare: PrepareConfig = PrepareConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()
    tune: TuneConfig = TuneConfig()
    compute: ComputeConfig = ComputeConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        for field, size in (("train", self.train.roi_size), ("validation", self.validation.roi_size)):
            if any(s < 1 or s % self.model.stride for s in size):
                raise ValueError(
                    f"{field}.roi_size {list(size)}: every edge must be a multiple of {self.model.stride}, "
                    f"the product of model.strides; nearest: "
                    f"{[max(1, round(s / self.model.stride)) * self.model.stride for s in size]}"
                )
        if (
            self.model.norm == "instance"
            and min(*self.train.roi_size, *self.validation.roi_size) <= self.model.stride
        ):
            raise ValueError(
                f"roi_size {self.model.stride} leaves one voxel at the bottom of the network, which instance norm "
                f"cannot normalise; use at least {2 * self.model.stride}, or model.norm=batch"
            )
        if self.train.batch_size % self.compute.workers:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} cannot be shared equally by compute.workers "
                f"{self.compute.workers}; make it a multiple"
            )
        if self.data.split.kind == "folds" and self.data.split.fold >= self.data.split.folds:
            raise ValueError(
                f"data.split.fold {self.data.split.fold} must be below "
                f"data.split.folds {self.data.split.folds}"
            )
        return self

    @property
    def num_classes(self) -> int:
        """Network outputs: background and one per organ."""
        return len(self.data.labels) + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-compatible dict, every field resolved; :func:`from_dict` reads it back."""
        return self.model_dump(mode="json")


def digest(value: Any) -> str:
    """Hex sha256 of a JSON-compatible value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def from_dict(values: Mapping[str, Any], origin: str = "config") -> Config:
    """Validate a nested dict.

    Raises:
        ConfigError: unknown keys or bad values, all of them, each with its dotted path.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ConfigError("; ".join(f"{origin}: {line}" for line in lines)) from None


def load_config(path: str | None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file (a path or s3:// URI; None: defaults only) and apply ``key=value`` overrides.

    Raises:
        ConfigError: the file cannot be read, or a key or value is refused.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = yaml.safe_load(storage.read_text(str(path))) or {}
        except storage.StorageError as error:
            raise ConfigError(f"cannot read the config: {error}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not a text file; pass a YAML config") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}: the config must be a mapping of sections, got {type(values).__name__}"
            )
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"override {override!r}: write it as section.field=value, e.g. train.lr=1e-3")
        try:
            _set(values, key.strip().split("."), yaml.safe_load(text))
        except yaml.YAMLError:
            raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    for section, names in PLACES.items():
        for name in names:
            place = values.get(section, {}).get(name) if isinstance(values.get(section), dict) else None
            if isinstance(place, str) and place:
                values[section][name] = storage.absolute(place)  # workers have other working directories
    return from_dict(values, origin=storage.name(path) if path else "config")


def _set(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        child = values.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {'.'.join(path)}: {part} is a value, not a section")
        values = child
    # A free mapping (data.labels) is replaced whole: merging would keep the organs of the file.
    values[path[-1]] = value


def replaced(config: Config, values: Mapping[str, Any], origin: str = "config") -> Config:
    """The config with fields changed, validated anew.

    Args:
        config: the base.
        values: dotted path → value.
        origin: names the change in an error.

    Raises:
        ConfigError: an unknown field or a value that is refused.
    """
    nested = config.to_dict()
    for path, value in values.items():
        _set(nested, path.split("."), value)
    return from_dict(nested, origin)


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All leaf fields in order as (dotted path, pydantic FieldInfo)."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from fields(info.annotation, f"{path}.")
        else:
            yield path, info


def describe_fields() -> str:
    """The text of ``--help``: every field with its type, default, unit and meaning."""
    rows = []
    for path, info in fields():
        default = json.dumps(info.default, ensure_ascii=False) if info.default is not None else "unset"
        rows.append(f"  {path} ({_type_name(info.annotation)}, default {default})\n      {info.description}")
    return "config fields (in the YAML file, or as section.field=value here):\n" + "\n".join(rows)


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return " | ".join(_type_name(a) for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is tuple:
        args = typing.get_args(annotation)
        return f"list of {_type_name(args[0])}" if args[-1] is ... else f"{len(args)} × {_type_name(args[0])}"
    if typing.get_origin(annotation) is dict:
        return "mapping"
    return getattr(annotation, "__name__", str(annotation))


def _explain(error: Mapping[str, Any]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{path}: no such field; {_nearest(path)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "model_type":
        message = "a section needs a mapping of fields"
    got = "" if isinstance(error["input"], dict | BaseModel) else f", got {error['input']!r}"
    return f"{path}: {message}{got}" if path else message


def _nearest(path: str) -> str:
    known = [name for name, _ in fields()]
    sections = sorted({name.rpartition(".")[0] for name in known})
    close = difflib.get_close_matches(path, known + sections, n=1, cutoff=0.6)
    if not close:  # the field may be right and the section wrong: compare the last parts
        leaf = difflib.get_close_matches(
            path.split(".")[-1], [k.split(".")[-1] for k in known], n=1, cutoff=0.6
        )
        close = [k for k in known if leaf and k.endswith("." + leaf[0])][:1]
    return f"did you mean {close[0]}?" if close else "--help lists all fields"
