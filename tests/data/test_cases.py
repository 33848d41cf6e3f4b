"""Pairing and splits: nothing is dropped in silence, and no patient is on both sides."""

import json

import pytest

from segcloud import storage
from segcloud.config import DataConfig, SplitConfig
from segcloud.data.cases import (
    BadCasesError,
    Case,
    DatasetError,
    Verdict,
    admit,
    find_images,
    load_dataset,
    safe_id,
    split_cases,
)


def _touch(uri, *names):
    for name in names:
        storage.put(b"x", storage.join(uri, *name.split("/")))
    return uri


def test_decathlon_pairs_by_name_and_tells_the_rest(storage_uri):
    uri = _touch(
        storage_uri, *[f"imagesTr/{n}.nii.gz" for n in "ab"], *[f"labelsTr/{n}.nii.gz" for n in "bc"]
    )
    dataset = load_dataset(DataConfig(uri=uri))
    assert [c.id for c in dataset.cases] == ["b"]
    assert {(v.case, v.code) for v in dataset.verdicts} == {("a", "no_label"), ("c", "no_image")}


def test_resource_forks_and_hidden_files_are_no_cases(tmp_path):
    uri = _touch(str(tmp_path), "imagesTr/a.nii.gz", "imagesTr/._a.nii.gz", "labelsTr/a.nii.gz")
    dataset = load_dataset(DataConfig(uri=uri))
    assert (len(dataset.cases), dataset.verdicts) == (1, [])


def test_an_empty_prefix_says_what_was_expected(bucket_uri):
    with pytest.raises(DatasetError, match="expected imagesTr/ and labelsTr/"):
        load_dataset(DataConfig(uri=bucket_uri))


def test_a_missing_bucket_is_named(s3):
    with pytest.raises(storage.BucketMissingError, match="no-such-bucket"):
        load_dataset(DataConfig(uri="s3://no-such-bucket/data"))


def _datalist(tmp_path, content):
    (tmp_path / "list.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return DataConfig(uri=str(tmp_path), datalist=str(tmp_path / "list.json"))


def test_datalist_gives_pairs_folds_and_patients(tmp_path):
    rows = [{"image": "./a.nii.gz", "label": "la.nii.gz", "fold": 1, "patient": "p"}, {"image": "b.nii.gz"}]
    dataset = load_dataset(_datalist(tmp_path, {"training": rows}))
    assert dataset.cases == [Case("a", f"{tmp_path}/a.nii.gz", f"{tmp_path}/la.nii.gz", "p", 1)]
    assert [v.code for v in dataset.verdicts] == ["no_label"]


@pytest.mark.parametrize("content", ["{", "[]", {"training": [{"label": "x"}]}, {"training": 3}, {}])
def test_a_bad_datalist_shows_the_expected_form(tmp_path, content):
    with pytest.raises(DatasetError, match="expected"):
        load_dataset(_datalist(tmp_path, content))


def test_a_datalist_path_cannot_leave_the_dataset(tmp_path):
    with pytest.raises(storage.StorageError):
        load_dataset(_datalist(tmp_path, {"training": [{"image": "../a.nii.gz", "label": "b.nii.gz"}]}))


def test_one_case_listed_twice_is_refused(tmp_path):
    row = {"image": "a.nii.gz", "label": "b.nii.gz"}
    with pytest.raises(DatasetError, match="listed twice: a"):
        load_dataset(_datalist(tmp_path, {"training": [row, row]}))


CASES = [Case(f"c{i}", f"i{i}", f"l{i}", patient=f"p{i // 2}", fold=i % 3) for i in range(10)]


def test_last_n_takes_the_last():
    training, validation = split_cases(CASES, SplitConfig(kind="last_n", n=2))
    assert [c.id for c in validation] == ["c8", "c9"]
    assert len(training) == 8


def test_last_n_refuses_a_patient_on_both_sides():
    with pytest.raises(DatasetError, match="patient would be on both sides"):
        split_cases(CASES, SplitConfig(kind="last_n", n=3))


def test_folds_keep_patients_together_and_cover_all():
    held_out = []
    for fold in range(5):
        training, validation = split_cases(CASES, SplitConfig(kind="folds", folds=5, fold=fold))
        assert not {c.patient for c in training} & {c.patient for c in validation}
        held_out += validation
    assert sorted(held_out, key=lambda c: c.id) == CASES


def test_listed_takes_the_datalists_fold():
    cases = [Case(c.id, c.image, c.label, c.id, c.fold) for c in CASES]
    _, validation = split_cases(cases, SplitConfig(kind="listed", fold=2))
    assert [c.id for c in validation] == ["c2", "c5", "c8"]


@pytest.mark.parametrize("split", [SplitConfig(n=10), SplitConfig(kind="listed", fold=7)])
def test_an_empty_side_is_refused(split):
    with pytest.raises(DatasetError, match=r"change data\.split"):
        split_cases(CASES, split)


def test_overfit_uses_every_case_twice():
    assert split_cases(CASES, SplitConfig(kind="overfit")) == (CASES, CASES)


def test_bad_cases_stop_or_pass_by_policy():
    verdict = Verdict("a", "truncated", "ends early", "s3://b/a.nii.gz")
    assert admit([verdict], "skip") == [verdict]
    with pytest.raises(BadCasesError, match=r"a: \[truncated\] ends early \(s3://b/a.nii.gz\)"):
        admit([verdict], "refuse")


@pytest.mark.parametrize("name", ["../../etc/passwd", "a b", "Müller", "x" * 300, "", "..", "a/b", "\n"])
def test_case_ids_are_safe_and_distinct(name):
    assert storage.name(storage.join("s3://bucket/out", safe_id(name))) == safe_id(name)
    assert safe_id(name) != safe_id(name + "!")


def test_one_name_in_two_folders_stays_two_pairs(storage_uri):
    names = [f"{side}/{scan}/ct.nii.gz" for side in ("imagesTr", "labelsTr") for scan in ("s1", "s2")]
    dataset = load_dataset(DataConfig(uri=_touch(storage_uri, *names[:3])))
    (case,) = dataset.cases
    assert (case.image, case.label) == (
        f"{storage_uri}/imagesTr/s1/ct.nii.gz",
        f"{storage_uri}/labelsTr/s1/ct.nii.gz",
    )
    assert [v.code for v in dataset.verdicts] == ["no_label"]


def test_two_files_of_one_name_are_a_verdict(tmp_path):
    uri = _touch(str(tmp_path), "imagesTr/a.nii.gz", "imagesTr/a.nii", "labelsTr/a.nii.gz")
    dataset = load_dataset(DataConfig(uri=uri))
    assert (dataset.cases, [v.code for v in dataset.verdicts]) == ([], ["two_files"])


def test_find_images_keeps_both_suffixes_apart_and_passes_over_hidden_files_and_own_masks(tmp_path):
    uri = _touch(str(tmp_path), "a.nii", "a.nii.gz", "._a.nii.gz", "a_seg.nii.gz", "out/b_seg.nii.gz")
    assert len({c.id for c in find_images(uri, uri)}) == 2
    assert len(find_images(uri, f"{uri}/out")) == 2


def test_find_images_takes_a_file_a_folder_and_equal_names(tmp_path):
    uri = _touch(str(tmp_path), "x/ct.nii.gz", "y/ct.nii.gz", "z.txt")
    assert len({c.id for c in find_images(uri)}) == 2
    assert [c.id for c in find_images(f"{uri}/x/ct.nii.gz")] == ["ct"]


def test_find_images_without_images_says_so(tmp_path):
    with pytest.raises(DatasetError, match=r"no \.nii\.gz or \.nii file"):
        find_images(_touch(str(tmp_path), "a.txt"))
