"""The repository's promises to itself: README, CI, lock and image agree, and the layering holds."""

import ast
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(
    line.split("==")
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if not line.startswith("#")
)
SOURCES = sorted((ROOT / "segcloud").rglob("*.py"))
# the only modules that may import Ray: everything else runs and is tested without a cluster
RAY_MODULES = {"cluster.py", "data/prepare.py", "training/trainer.py", "inference/batch.py"}
RAY_MODULES |= {"training/follow.py", "training/tuning.py", "training/search_space.py"}
# a module may import from its own layer and those after it
LAYERS = [
    {"training", "inference", "report"},
    {"data", "model", "evaluation", "synthetic", "cluster", "cli", "embedded_s3"},
    {"storage", "config", "progress", "errors"},
]


def _canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_ci_runs_the_readmes_test_command_word_for_word():
    commands = re.findall(r"^python3 -m venv \.venv && .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands[0].endswith("python jobs/demo.py")


def test_the_lock_satisfies_every_dependency():
    wanted = PROJECT["dependencies"] + [
        r for extra in PROJECT["optional-dependencies"].values() for r in extra
    ]
    locked = {_canonical(name): version for name, version in LOCK.items()}
    for requirement in map(Requirement, wanted):
        if _canonical(requirement.name) != "segcloud":
            assert requirement.specifier.contains(locked[_canonical(requirement.name)]), requirement


def test_the_tests_run_on_the_locked_ray_and_torch():
    assert metadata.version("ray") == LOCK["ray"]
    assert metadata.version("torch").partition("+")[0] == LOCK["torch"]


def test_the_image_installs_from_the_lock_and_runs_as_non_root():
    text = (ROOT / "Dockerfile").read_text()
    assert "-c requirements.lock" in text
    assert re.search(r"^USER (?!0)\d+", text, re.MULTILINE)


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_ray_stays_in_its_modules(path):
    if str(path.relative_to(ROOT / "segcloud")) not in RAY_MODULES:
        assert not [name for name in _imports(path) if name.split(".")[0] == "ray"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    def layer(name):
        return next((i for i, modules in enumerate(LAYERS) if name in modules), None)

    own = layer(path.relative_to(ROOT / "segcloud").parts[0].removesuffix(".py"))
    for name in _imports(path):
        if name.startswith("segcloud.") and own is not None:
            assert layer(name.split(".")[1]) in (None, *range(own, len(LAYERS))), name


def test_no_file_passes_600_lines():
    long = [str(p) for p in SOURCES if len(p.read_text().splitlines()) > 600]
    assert long == []
