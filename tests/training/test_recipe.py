import dataclasses

import pytest

from nexus_adapters.training.config import TrainConfig
from nexus_adapters.training.recipe import dump_config, load_recipe, parse_config

LEAST = 'output_dir = "out"\n[data]\npath = "images"\n'


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(LEAST)
    return path


def test_what_a_recipe_leaves_out_keeps_its_default(recipe):
    config = load_recipe(recipe)
    assert config == TrainConfig(output_dir="out", data=dataclasses.replace(config.data, path="images"))
    assert config.training.learning_rate == 1e-5  # the release's
    assert config.training.betas == (0.9, 0.999)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("training.learning_rate=2e-5", 2e-5),
        ("training.learning_rate=1", 1.0),
        ("training.batch_size=16", 16),
        ("training.compile=true", True),
        ("base.path=/a b/c=d", "/a b/c=d"),
        ("base.path=2024-01-02", "2024-01-02"),
        ('base.path="quoted"', "quoted"),
        ("base.path=", ""),
        ("output_dir=2024", "2024"),  # a folder
        ("data.revision=1e5", "1e5"),
        ("loss.band=[0.25, 1]", (0.25, 1.0)),
        ('log.trackers=["wandb"]', ("wandb",)),
        ("data.extractor.low=50", None),
        ("  seed = 7", 7),
    ],
)
def test_settings(recipe, setting, value):
    config = load_recipe(recipe, [setting])
    key = setting.partition("=")[0].strip().split(".")
    found = config
    for name in key if value is not None else ():
        found = getattr(found, name)
    if value is None:
        assert config.data.extractor == {"low": 50.0}
    else:
        assert found == value
        assert type(found) is type(value)


def test_the_last_of_equal_settings_holds(recipe):
    assert load_recipe(recipe, ["seed=1", "seed=2"]).seed == 2


def test_the_whole_config_is_read_back(recipe):
    config = load_recipe(recipe, ['log.trackers=["wandb"]', "data.extractor.low=50", "loss.band=[0.1, 0.9]"])
    recipe.write_text(dump_config(config))
    assert load_recipe(recipe) == config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "training.lerning_rate=1",
            "training.lerning_rate: no such key; did you mean training.learning_rate?",
        ),
        ("trainin.batch_size=1", "trainin: no such key; did you mean training?"),
        ("hub.zzz=1", "hub.zzz: no such key; expected one of repo_id, private"),
        ("training.batch_size=0", "training.batch_size: expected a number greater than 0; received 0"),
        ("training.batch_size=many", "training.batch_size: expected an integer; received 'many'"),
        ("training.batch_size=1.5", "training.batch_size: expected an integer; received 1.5"),
        ("seed=true", "seed: expected an integer; received True"),
        ("data.shards=[3]", "data.shards.0: expected a string; received 3"),
        ("training.learning_rate=nan", "training.learning_rate: expected a finite number; received nan"),
        ("training=3", "training: expected a table; received 3"),
        ("training.compile=1", "training.compile: expected true or false; received 1"),
        (
            "training={cuda_graphs=true, compile=true}",
            "training.cuda_graphs: expected false beside compile and gradient_checkpointing; received True",
        ),
        ("loss.band=[0.5]", "loss.band: expected more values; received [0.5]"),
        (
            "loss.band=[0.5, 0.2]",
            "loss.band: expected a lower and then a higher fraction; received (0.5, 0.2)",
        ),
        (
            "loss.prompt_dropout=1.5",
            "loss.prompt_dropout: expected a number less than or equal to 1; received 1.5",
        ),
        (
            "adapter.method=foo",
            "adapter.method: expected 'prime', 'slim', 't2i', 'controlnet' or 'controlnet-xs'; "
            "received 'foo'",
        ),
        ("adapter.zero_init=true", "adapter.zero_init: expected false without residual; received True"),
        (
            "data.extractor.low=[1]",
            "data.extractor.low: expected a number, true, false or a string; received [1]",
        ),
        ("output_dir=", "output_dir: expected a folder; received ''"),
        ("data.path=", "data.path: expected a path, for kind folder; received ''"),
        ("data.kind=tars", "data.shards: expected at least one, for kind tars; received ()"),
        ("data.kind=scenes", "data.count: expected at least 1, for kind scenes; received 0"),
        ("batch_size", "--set: expected KEY=VALUE, as in training.batch_size=4; received 'batch_size'"),
        ("=3", "--set: expected KEY=VALUE, as in training.batch_size=4; received '=3'"),
        ("output_dir.x=3", "--set: expected the name of a section before '.x'; received 'output_dir'"),
    ],
)
def test_what_is_wrong_is_told_by_its_key(recipe, setting, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
        load_recipe(recipe, [setting])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_t2i_has_no_skip(recipe):
    with pytest.raises(
        ValueError, match=r"^adapter.residual: expected false beside method t2i; received True$"
    ):
        load_recipe(recipe, ["adapter.method=t2i", "adapter.residual=true"])


def test_a_controlnet_reads_the_timestep_itself(recipe):
    settings = ["adapter.method=controlnet", "adapter.residual=false", "adapter.noise_exponent=1"]
    with pytest.raises(ValueError, match=r"^adapter.noise_exponent: expected 0 beside method controlnet, "):
        load_recipe(recipe, settings)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(
        ValueError, match=r"^RECIPE: expected a TOML file; received '.*', which does not exist"
    ):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(ValueError, match=r"^RECIPE: expected TOML; received"):
        load_recipe(tmp_path / "bad.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"^RECIPE: expected TOML; received"):
        load_recipe(tmp_path / "bytes.toml")


def test_a_config_is_frozen():
    config = parse_config({"output_dir": "out", "data": {"path": "x"}})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_every_field_says_what_it_is():
    def fields(kind, prefix=""):
        for field in dataclasses.fields(kind):
            inner = field.default_factory if dataclasses.is_dataclass(field.default_factory) else None
            yield from (
                fields(inner, f"{prefix}{field.name}.") if inner else [(prefix + field.name, kind, field)]
            )

    listed = list(fields(TrainConfig))
    assert len(listed) > 50
    for key, kind, field in listed:
        described = kind.__pydantic_fields__[field.name].description
        assert described, key
        assert described.strip().endswith("."), key
