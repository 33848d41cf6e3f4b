"""The config: one order of precedence, every field documented, every mistake named with the way out."""

from pathlib import Path

import pytest

from segcloud.config import Config, ConfigError, describe_fields, fields, from_dict, load_config

ARTICLE = "jobs/configs/spleen_article.yaml"


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {lr: 0.5, epochs: 7}")
    config = load_config(str(file), ["train.lr=1e-3"])
    assert (config.train.lr, config.train.epochs, config.train.batch_size) == (1e-3, 7, 8)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.lrr=1", "train.lrr: no such field; did you mean train.lr?"),
        ("trian.lr=1", "trian: no such field; did you mean train?"),
        ("lr=1", "did you mean train.lr?"),
        ("train.lr=-1", "train.lr: Input should be greater than 0, got -1"),
        ("train.loss=dicee", "train.loss: Input should be 'dice' or 'dice_ce'"),
        ("train.roi_size=[90, 96, 96]", "train.roi_size [90, 96, 96]: every edge must be a multiple of 16"),
        ("compute.workers=3", "train.batch_size 8 cannot be shared equally by compute.workers 3"),
        ("model={norm: instance, channels: [8, 16], strides: [96]}", "use at least 192, or model.norm=batch"),
        ("model.strides=[2]", "5 channels need 4 strides, got 1"),
        ("prepare.window=[100, -100]", "prepare.window: needs (low, high) in HU"),
        ("prepare.orientation=RAR", "prepare.orientation: needs three axis codes"),
        ("data.labels={spleen: 0}", "data.labels: needs distinct label values between 1 and 255"),
        ("data.split={kind: folds, fold: 9}", "data.split.fold 9 must be below data.split.folds 5"),
        ("train=3", "train: a section needs a mapping"),
        ("train.lr", "write it as section.field=value"),
        ("run.uri=[", "the value is not valid YAML"),
    ],
)
def test_a_mistake_is_refused_with_its_path_and_the_remedy(override, told):
    with pytest.raises(ConfigError, match=r".") as caught:
        load_config(None, [override])
    assert told in str(caught.value)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        from_dict({"train": {"lrr": 1, "epochs": 0}})
    assert "train.lrr" in str(caught.value)
    assert "train.epochs" in str(caught.value)


@pytest.mark.parametrize("content", ["- 1", "a: [", "\x00"])
def test_a_file_that_is_no_config_is_refused(tmp_path, content):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(str(file))


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_yaml_tags_do_not_run(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: !!python/object/apply:os.system ['true']")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(str(file))


def test_resolved_config_reads_back_equal():
    config = load_config(ARTICLE, ["data.labels={liver: 5, spleen: 1}", "prepare.dtype=uint8"])
    assert from_dict(config.to_dict()) == config


def test_help_names_every_field_with_a_description():
    text = describe_fields()
    for path, info in fields():
        assert f"  {path} (" in text
        assert info.description, path


def test_fast_recipe_file_is_the_default():
    assert load_config("jobs/configs/spleen.yaml") == Config()


def test_demo_config_loads():
    assert load_config("jobs/configs/demo.yaml").compute.workers == 2


def test_article_config_resolves_to_the_articles_values():
    config = load_config(ARTICLE)
    assert config.prepare.window == (-57, 164)
    assert config.prepare.crop_foreground
    assert config.prepare.orientation == "RAS"
    assert config.prepare.spacing == (1.5, 1.5, 2.0)
    assert config.model.channels == (16, 32, 64, 128, 256)
    assert config.model.strides == (2, 2, 2, 2)
    assert (config.model.num_res_units, config.model.norm, config.model.dropout) == (2, "batch", 0)
    train = config.train
    assert (train.roi_size, train.positive, train.negative, train.samples_per_case) == ((96,) * 3, 1, 1, 4)
    assert (train.loss, train.optimizer, train.lr, train.weight_decay) == ("dice", "adam", 1e-4, 0)
    assert (train.schedule, train.epochs, train.precision) == ("constant", 500, "fp32")
    assert (train.batch_size, train.shuffle) == (2 * 4, "cases")
    assert train.augment == type(train.augment)()
    assert (config.validation.every, config.validation.roi_size, config.validation.sw_batch_size) == (
        2,
        (160,) * 3,
        4,
    )
    assert (config.data.split.kind, config.data.split.n, config.data.labels) == ("last_n", 9, {"spleen": 1})


def test_local_places_become_absolute_and_buckets_stay():
    config = load_config(None, ["data.uri=scans", "run.uri=s3://b/runs/a", "prepare.cache_dir=cache"])
    assert config.data.uri == str(Path("scans").absolute())
    assert config.prepare.cache_dir == str(Path("cache").absolute())
    assert config.run.uri == "s3://b/runs/a"
