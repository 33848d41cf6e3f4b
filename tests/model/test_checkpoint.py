"""Checkpoints and models: whole or passed over, and nothing from storage is ever unpickled."""

import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch

from segcloud import storage
from segcloud.model import checkpoint
from segcloud.model.network import build_network
from tests.helpers import tiny_config

EVIDENCE = Path(tempfile.gettempdir()) / f"segcloud-evil-{os.getpid()}"


class Evil:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (EVIDENCE.touch, ())


@pytest.fixture
def told():
    return []


@pytest.fixture
def run_uri(bucket_uri):
    return storage.join(bucket_uri, "run")


@pytest.fixture
def store(run_uri, told):
    return checkpoint.CheckpointStore(run_uri, keep=2, uploader=checkpoint.Uploader(told.append))


def _save(store, *epochs):
    for epoch in epochs:
        store.save(epoch, {"epoch": epoch, "w": torch.full((3,), float(epoch)), "history": [{"loss": 0.5}]})
    store.uploader.flush()


def test_the_newest_comes_back_and_older_ones_go(store, run_uri, told):
    _save(store, 1, 2, 3)
    state = checkpoint.load_latest(run_uri, told.append)
    assert (state["epoch"], state["w"].tolist(), told) == (3, [3, 3, 3], [])
    names = [storage.name(i.uri) for i in storage.list_objects(storage.join(run_uri, "checkpoints"))]
    assert names == ["epoch_00002.pt", "epoch_00003.pt"]


def test_no_checkpoint_is_none(run_uri, told):
    assert checkpoint.load_latest(run_uri, told.append) is None


def _evil(path):
    path.write_bytes(pickle.dumps(Evil()))
    return path


def _evil_zip(path):
    torch.save(Evil(), path)
    return path


def _cut(path):
    torch.save({"epoch": 3}, path)
    path.write_bytes(path.read_bytes()[:-50])
    return path


@pytest.mark.parametrize("make", [_evil, _evil_zip, _cut])
def test_a_damaged_or_malicious_newest_is_passed_over_and_told(store, run_uri, told, tmp_path, make):
    _save(store, 1, 2)
    storage.put(make(tmp_path / "x"), storage.join(run_uri, "checkpoints", "epoch_00003.pt"))
    (tmp_path / "x").unlink()
    assert checkpoint.load_latest(run_uri, told.append)["epoch"] == 2
    assert "epoch_00003.pt is damaged or refused" in told[0]
    assert not EVIDENCE.exists()


def test_an_upload_failure_is_told_and_not_raised(told):
    uploader = checkpoint.Uploader(told.append)
    uploader.submit("checkpoint of epoch 1", lambda: storage.put(b"x", "s3://no-such-bucket-here/x"))
    uploader.flush()
    assert uploader.failures == 1
    assert told[0].startswith("warning: checkpoint of epoch 1 was not stored")


@pytest.fixture
def config():
    return tiny_config(data={"labels": {"spleen": 1, "liver": 5}})


def test_a_model_comes_back_with_its_config(run_uri, config):
    torch.manual_seed(0)
    network = build_network(config)
    storage.put(
        checkpoint.encode_model(network.state_dict(), config, {"epoch": 3}), checkpoint.model_uri(run_uri)
    )
    model = checkpoint.load_model(run_uri)
    x = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(model.network(x), network.eval()(x))
    assert (model.config, model.info) == (config, {"epoch": 3})
    assert model.digest == storage.stat(model.uri).metadata["sha256"]


def test_a_model_names_no_place_of_its_training(config):
    named = config.model_copy(
        update={"run": config.run.model_copy(update={"uri": "s3://secret-bucket/runs/a"})}
    )
    assert b"secret-bucket" not in checkpoint.encode_model(build_network(named).state_dict(), named, {})


def test_a_missing_model_says_how_to_get_one(run_uri):
    with pytest.raises(checkpoint.ModelError, match=r"jobs/train\.py"):
        checkpoint.load_model(run_uri)


@pytest.mark.parametrize("cut", [slice(0, 500), slice(0, 7), slice(0, 0), slice(100, None)])
def test_a_damaged_model_is_refused(run_uri, config, cut):
    data = checkpoint.encode_model(build_network(config).state_dict(), config, {})
    storage.put(data[cut], checkpoint.model_uri(run_uri))
    with pytest.raises(checkpoint.ModelError, match="not a segcloud model, or damaged"):
        checkpoint.load_model(run_uri)


def test_a_pickle_named_as_a_model_is_refused(run_uri):
    storage.put(pickle.dumps(Evil()), checkpoint.model_uri(run_uri))
    with pytest.raises(checkpoint.ModelError):
        checkpoint.load_model(run_uri)
