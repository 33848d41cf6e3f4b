"""Prepared volumes: stated precision, keys that change with what matters, a bounded local copy."""

import numpy as np
import pytest

from segcloud import storage
from segcloud.config import PrepareConfig, load_config
from segcloud.data.cases import load_dataset
from segcloud.data.nifti import BadScan
from segcloud.data.prepared import CacheFullError, PreparedStore, PreparedVolume, key, read_scan, write
from segcloud.data.transforms import prepare
from tests.helpers import overrides, phantom_volumes, tiny_config, write_cases


@pytest.fixture
def prepared():
    image, label = phantom_volumes(0, spacing=(6, 6, 6))
    config = tiny_config()
    return prepare(image, label, config.prepare, config.data.labels)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-12), ("uint8", 1 / 510 + 1e-6)])
def test_quantisation_stays_within_the_stated_error(tmp_path, prepared, dtype, error):
    write(tmp_path / "v.safetensors", prepared, dtype, {})
    volume = PreparedVolume(tmp_path / "v.safetensors")
    assert np.abs(volume.decode() - prepared.image).max() <= error
    assert np.array_equal(volume.label, prepared.label)


def test_the_file_is_memory_mapped_and_keeps_geometry(tmp_path, prepared):
    write(tmp_path / "v.safetensors", prepared, "float16", {})
    volume = PreparedVolume(tmp_path / "v.safetensors")
    assert isinstance(volume.image, np.memmap)
    assert np.array_equal(volume.geometry.affine, prepared.affine)
    assert np.array_equal(volume.geometry.box, prepared.box)
    assert volume.geometry.source_shape == prepared.source_shape
    assert np.array_equal(volume.foreground, np.flatnonzero(prepared.label))


def _key(case, config):
    return key(case, storage.stat(case.image), storage.stat(case.label), config)


def test_the_key_changes_with_source_transform_and_labels_only(tmp_path):
    base = tiny_config(data={"uri": str(write_cases(tmp_path, 1))})
    (case,) = load_dataset(base.data).cases
    name = _key(case, base)
    for change in ("prepare.spacing=[9, 9, 9]", "prepare.dtype=uint8", "data.labels={spleen: 2}"):
        assert _key(case, load_config(None, [*overrides(base), change])) != name
    for change in ("train.lr=0.1", "prepare.cache_gb=3", "data.labels={milt: 1}"):
        assert _key(case, load_config(None, [*overrides(base), change])) == name
    storage.put(storage.read(case.image) + b"", case.image)  # written anew
    assert _key(case, base) != name


@pytest.fixture
def published(tmp_path, bucket_uri):
    config = tiny_config(data={"uri": str(write_cases(tmp_path / "data", 2))})
    store = PreparedStore(
        bucket_uri, config.prepare.model_copy(update={"cache_dir": str(tmp_path / "cache")})
    )
    cases = load_dataset(config.data).cases
    return store, [store.publish(case, f"{case.id}.safetensors", config) for case in cases]


def test_the_node_that_made_a_volume_does_not_fetch_it(published, monkeypatch):
    store, refs = published
    monkeypatch.setattr(storage, "fetch", None)
    assert store.open(refs[0]).label.any()


def test_another_node_fetches_once(published, tmp_path, monkeypatch):
    refs, store = published[1], _other_node(published[0], tmp_path)
    fetched, fetch = [], storage.fetch
    monkeypatch.setattr(storage, "fetch", lambda uri, path: fetched.append(uri) or fetch(uri, path))
    assert np.array_equal(store.open(refs[0]).label, store.open(refs[0]).label)
    assert len(fetched) == 1


def _other_node(store, tmp_path):
    return PreparedStore(store.uri, PrepareConfig(cache_dir=str(tmp_path / "other")))


def test_the_oldest_use_leaves_first_and_open_maps_stay_readable(published):
    store, refs = published
    first = store.open(refs[0])
    store.budget = max(ref.size for ref in refs)
    (store.cache / storage.name(refs[1].uri)).unlink()
    second = store.open(refs[1])
    assert not first.path.exists()
    assert second.path.exists()
    assert first.label.any()  # the mapping outlives the name


def test_a_budget_too_small_is_named(published):
    store, refs = published
    store.budget = 10
    for file in store.cache.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CacheFullError, match=r"raise prepare\.cache_gb"):
        store.open(refs[0])


def test_a_damaged_volume_is_not_trained_on(published, tmp_path):
    store, refs = published
    data = bytearray(storage.read(refs[0].uri))
    metadata = storage.stat(refs[0].uri).metadata
    data[-1] ^= 1
    client = storage.s3_client()
    bucket, _, object_key = refs[0].uri.removeprefix("s3://").partition("/")
    client.put_object(Bucket=bucket, Key=object_key, Body=bytes(data), Metadata=metadata)
    with pytest.raises(storage.CorruptError):
        _other_node(store, tmp_path).open(refs[0])


@pytest.mark.parametrize("orientation", ["RAS", "SAR", "RSA", "LSA", "IPL"])
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_permuted_source_that_needs_no_resampling_is_stored_as_it_is(tmp_path, orientation, dtype):
    image, label = phantom_volumes(0, spacing=(8, 8, 8), orientation=orientation)
    config = tiny_config()
    prepared = prepare(image, label, config.prepare, config.data.labels)
    write(tmp_path / "v.safetensors", prepared, dtype, {})
    volume = PreparedVolume(tmp_path / "v.safetensors")
    assert np.abs(volume.decode() - prepared.image).max() < 0.002
    assert np.array_equal(volume.label, prepared.label)


def test_a_run_that_cannot_be_held_on_a_node_is_refused(published):
    store, refs = published
    store.check_budget(refs)
    store.budget = sum(ref.size for ref in refs) - 1
    with pytest.raises(CacheFullError, match=r"raise prepare\.cache_gb"):
        store.check_budget(refs)


def test_a_source_that_may_not_be_read_is_a_verdict(tmp_path):
    with pytest.raises(BadScan) as caught:
        read_scan(str(tmp_path / "gone.nii.gz"))
    assert caught.value.code == "unreadable"
