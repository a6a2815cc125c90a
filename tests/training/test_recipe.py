import ast
import dataclasses
import inspect
import itertools
import sys
from contextlib import nullcontext

import pytest
import tomli_w
from tests.refusals import refused

from nexus_adapters.data.prepared_set import INDEX
from nexus_adapters.errors import MISSING
from nexus_adapters.methods import METHODS, find_method
from nexus_adapters.methods.controlnet import ControlNetOptions
from nexus_adapters.methods.nexus import NexusOptions
from nexus_adapters.methods.t2i import T2IOptions
from nexus_adapters.training.config import DataOptions, TrainConfig
from nexus_adapters.training.recipe import dump_config, load_recipe, load_run_recipe, parse_config
from nexus_adapters.training.run_folder import check_run_folder
from nexus_adapters.training.run_identity import identity

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
        ("base.revision=1e5", "1e5"),
        ("base.config=2024", "2024"),
        ("base.prediction_type=v_prediction", "v_prediction"),
        ("adapter.heads=8", 8),
        ("adapter.noise_exponent=1", 1.0),
        ('imports=["json"]', ("json",)),
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


def test_an_adapter_in_a_folder_of_digits(recipe):
    """Which is read only where the recipe names no method."""
    assert load_recipe(recipe, ["adapter.method=t2i", "adapter.start_from=2024"]).adapter.start_from == "2024"
    with refused("adapter.start_from", "'2024', which does not exist"):
        load_recipe(recipe, ["adapter.start_from=2024"])


def test_the_last_of_equal_settings_holds(recipe):
    assert load_recipe(recipe, ["seed=1", "seed=2"]).seed == 2


def test_the_whole_config_is_read_back(recipe):
    config = load_recipe(recipe, ['log.trackers=["wandb"]', "data.extractor.low=50", "loss.band=[0.1, 0.9]"])
    recipe.write_text(dump_config(config))
    assert load_run_recipe(recipe) == config
    assert load_recipe(recipe) == config  # a run can be repeated by what it has kept
    assert load_recipe(recipe, ["seed=3"]) == dataclasses.replace(config, seed=3)


@pytest.mark.parametrize(
    "section",
    [
        {"method": "slim-paper", "groups": 4, "noise_exponent": 0.5, "block_options": {"gain": [1, "a"]}},
        {"method": "t2i", "noise_exponent": 1.0},
        {"method": "controlnet", "start_from": "somewhere"},
        {"method": "controlnet-xs", "size_ratio": 0.25},
    ],
    ids=lambda section: section["method"],
)
def test_the_options_of_every_method_are_read_back(recipe, section):
    config = parse_config({"output_dir": "o", "data": {"path": "x"}, "adapter": section})
    assert {name: getattr(config.adapter, name) for name in section} == section
    recipe.write_text(dump_config(config))
    assert load_run_recipe(recipe) == config


@pytest.mark.parametrize("version", [0, 3, "2", [2]])
def test_a_recipe_of_a_newer_version(recipe, version):
    config = load_recipe(recipe)
    recipe.write_text(
        dump_config(config).replace("format_version = 2", tomli_w.dumps({"format_version": version}))
    )
    for load, argument in ((load_recipe, "RECIPE"), (load_run_recipe, "output_dir")):
        with refused(argument, f"version {version} in '{recipe}'", expected="2 or older", hint="Upgrade"):
            load(recipe)


@pytest.mark.parametrize(
    ("setting", "key", "expected", "received"),
    [
        ("hub.zzz=1", "hub.zzz", "one of the keys repo_id, private, license, base_model", "an unknown key"),
        ("training.batch_size=0", "training.batch_size", "a number greater than 0", "0"),
        ("training.batch_size=many", "training.batch_size", "an integer", "'many'"),
        ("training.batch_size=1.5", "training.batch_size", "an integer", "1.5"),
        ("seed=true", "seed", "an integer", "True"),
        ("data.shards=[3]", "data.shards.0", "a string", "3"),
        ("training.learning_rate=1e300", "training.learning_rate", "less than or equal to 1", "1e+300"),
        ("training.learning_rate=nan", "training.learning_rate", "a finite number", "nan"),
        ("training=3", "training", "a table", "3"),
        ("adapter=3", "adapter", "a table", "3"),
        ("training.compile=1", "training.compile", "true or false", "1"),
        (
            "training={cuda_graphs=true, compile=true}",
            "training.cuda_graphs",
            "false with training.compile or training.gradient_checkpointing",
            "True",
        ),
        ("loss.band=[0.5]", "loss.band", "more values", "[0.5]"),
        ("loss.band=[0.5, 0.2]", "loss.band", "two fractions in ascending order", "(0.5, 0.2)"),
        ("loss.prompt_dropout=1.5", "loss.prompt_dropout", "a number less than or equal to 1", "1.5"),
        ("base.prediction_type=sample", "base.prediction_type", "'epsilon' or 'v_prediction'", "'sample'"),
        (
            "adapter.method=foo",
            "adapter.method",
            "prime, slim, prime-paper, slim-paper, t2i, controlnet, controlnet-xs",
            "'foo'",
        ),
        ("adapter.method=3", "adapter.method", "a known method", "3"),
        ("adapter.heads=1.5", "adapter.heads", "an integer", "1.5"),
        ("adapter.heads=-1", "adapter.heads", "from 0", "-1"),
        (f"adapter.head_width={10**400}", "adapter.head_width", "to 4096", "1000"),
        (f"adapter.heads={2**31}", "adapter.heads", "to 4096", f"{2**31}"),
        (f"adapter={{method='slim', groups={2**63 - 1}}}", "adapter.groups", "to 4096", f"{2**63 - 1}"),
        ("adapter={method='controlnet-xs', size_ratio=1e308}", "adapter.size_ratio", "at most 4", "1e+308"),
        (f"data.resolution={2**31}", "data.resolution", "less than or equal to 16384", f"{2**31}"),
        (f"data.resolution={10**400}", "data.resolution", "less than or equal to 16384", "1000"),
        ("adapter.groups=2", "adapter.groups", "0 for method prime", "2"),
        ("adapter={method='slim', groups=1}", "adapter.groups", "0, or 2 or more", "1"),
        ("adapter.noise_exponent=-1", "adapter.noise_exponent", "at least 0", "-1"),
        ("adapter.noise_exponent=nan", "adapter.noise_exponent", "a finite number", "nan"),
        ("adapter={method='t2i', noise_exponent=-1}", "adapter.noise_exponent", "at least 0", "-1"),
        ("adapter={method='controlnet-xs', size_ratio=0}", "adapter.size_ratio", "above 0", "0"),
        (
            "adapter.zzz=1",
            "adapter.zzz",
            "method, start_from, start_from_optimizer, residual",
            "an unknown key",
        ),
        ("adapter={method='prime-paper', zero_init=true}", "adapter.zero_init", "residual", "True"),
        ("adapter={residual=false, zero_init=true}", "adapter.zero_init", "residual", "True"),
        ("adapter={method='prime-paper', residual=true}", "adapter.residual", "'prime-paper'", "True"),
        (
            "adapter.reads_prompt=false",
            "validation.images",
            "0 for an adapter that does not read the prompt",
            "4",
        ),
        (
            "data.extractor.low=[1]",
            "data.extractor.low",
            "a number, true, false or a string",
            "[1]",
        ),
        ("validation={every_steps=0, select='best'}", "validation.select", "auto or last", "'best'"),
        ("loss.condition_dropout=1", "loss.condition_dropout", "a number less than 1", "1"),
        ("adapter.start_from_optimizer=true", "adapter.start_from_optimizer", "adapter.start_from", "True"),
        ("output_dir=", "output_dir", "a folder", "''"),
        ("data.path=", "data.path", "a path, for data.kind 'folder'", "''"),
        ("data={kind='tars'}", "data.shards", "at least one, for data.kind 'tars'", MISSING),
        ("data={kind='scenes'}", "data.count", "1 to 1,000,000, for", "0"),
        ("data={kind='scenes', count=4000000000}", "data.count", "1 to 1,000,000, for", "4000000000"),
        ("data.workers=4000000000", "data.workers", "less than or equal to 1024", "4000000000"),
        ("batch_size", "--set", "KEY=VALUE, such as seed=4", "'batch_size'"),
        ("=3", "--set", "KEY=VALUE, such as seed=4", "'=3'"),
        ("output_dir.x=3", "--set", "the name of a section before '.x'", "'output_dir'"),
    ],
)
def test_what_is_wrong_is_named_by_its_key(recipe, setting, key, expected, received):
    with refused(key, received, expected=expected) as caught:
        load_recipe(recipe, [setting])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "key", "meant"),
    [
        ("training.lerning_rate=1", "training.lerning_rate", "training.learning_rate?"),
        ("trainin.batch_size=1", "trainin", "training?"),
        ("adapter.star_from=x", "adapter.star_from", "adapter.start_from?"),
    ],
)
def test_the_nearest_key_is_named(recipe, setting, key, meant):
    with refused(key, "an unknown key", hint=meant.rstrip("?")):
        load_recipe(recipe, [setting])


def test_early_stopping_needs_images(recipe):
    settings = ["validation.early_stop_patience=2", "validation.images=0"]
    with refused("validation.early_stop_patience", "2", expected="0 without validation images"):
        load_recipe(recipe, settings)


def method_options():
    """(method, key, value, the methods that have it) of every option that some method lacks."""
    values = {
        "residual": False,
        "zero_init": True,
        "groups": 2,
        "heads": 2,
        "head_width": 4,
        "noise_exponent": 0.0,
        "reads_prompt": True,
        "train": "all",
        "block": "paper",
        "block_options": {},
        "size_ratio": 0.125,
    }
    nexus = ("prime", "slim", "prime-paper", "slim-paper")
    for key, value in values.items():
        own = ("controlnet-xs",) if key == "size_ratio" else nexus
        own = (*nexus, "t2i") if key == "noise_exponent" else own
        for method in (*nexus, "t2i", "controlnet", "controlnet-xs"):
            if method not in own:
                yield pytest.param(method, key, value, own, id=f"{method}-{key}")


@pytest.mark.parametrize(("method", "key", "value", "others"), list(method_options()))
def test_an_option_without_effect_is_refused(method, key, value, others):
    """Whatever its value, the default included; the methods that have it are named."""
    content = {"output_dir": "o", "data": {"path": "x"}, "adapter": {"method": method, key: value}}
    with refused(
        f"adapter.{key}", repr(value), expected=f"it has no effect with method {method!r}"
    ) as caught:
        parse_config(content)
    assert caught.value.hint == f"It is an option of {', '.join(others)}"


def test_every_option_of_a_method_is_in_the_list():
    keys = {param.values[1] for param in method_options()}
    for kind in (NexusOptions, T2IOptions):
        assert {f.name for f in dataclasses.fields(kind)} - {
            "method",
            "start_from",
            "start_from_optimizer",
        } <= keys
    assert {f.name for f in dataclasses.fields(ControlNetOptions)} == {
        "method",
        "start_from",
        "start_from_optimizer",
    }


# What has an effect for some kinds of data only: another value, and for which kinds it has.
EFFECTIVE = {
    "path": ("images", "folder prepared table"),
    "shards": (["a.tar"], "tars"),
    "config_name": ("small", "table"),
    "revision": ("v2", "table"),
    "split": ("test", "table"),
    "image_column": ("image", "folder table tars"),
    "condition_column": ("map", "folder table tars"),
    "caption_column": ("text", "folder table tars"),
    "allow_outside": (True, "folder prepared table"),
    "aspect_buckets": (True, "folder prepared table tars"),
}
LEAST_OF = {
    "folder": {"path": "x"},
    "prepared": {"path": "x"},
    "table": {"path": "x"},
    "tars": {"shards": ["b.tar"]},
    "scenes": {"count": 5},
}


@pytest.mark.parametrize("kind", LEAST_OF)
@pytest.mark.parametrize("key", EFFECTIVE)
def test_what_has_no_effect_for_the_kind_of_data_is_refused(kind, key):
    value, kinds = EFFECTIVE[key]
    content = {"output_dir": "o", "data": {"kind": kind, **LEAST_OF[kind], key: value}}
    if kind in kinds.split():
        found = getattr(parse_config(content).data, key)
        assert found == (tuple(value) if isinstance(value, list) else value)
        return
    shown = value[0] if isinstance(value, list) else str(value)
    with refused(f"data.{key}", shown, expected=f"data.kind {kind!r}"):
        parse_config(content)


def test_what_says_where_data_are_names_the_key_that_the_kind_has():
    for data, name, other in (
        ({"kind": "tars", "path": "x"}, "path", "shards"),
        ({"kind": "folder", "shards": ["a.tar"]}, "shards", "path"),
        ({"kind": "table", "path": "y", "shards": ["a.tar"]}, "shards", "path"),
    ):
        with refused(f"data.{name}", expected=f"data.{other} instead"):
            parse_config({"output_dir": "o", "data": data})


# All other options of the data, with another value.
ALWAYS_EFFECTIVE = {
    "condition": "depth",
    "extractor": {"low": 1.0},
    "count": 7,
    "resolution": 64,
    "max_bad_fraction": 0.5,
    "workers": 1,
}


@pytest.mark.parametrize("kind", LEAST_OF)
def test_all_else_has_an_effect_for_every_kind_of_data(kind):
    fields = {field.name for field in dataclasses.fields(DataOptions)}
    assert fields == {"kind", *EFFECTIVE, *ALWAYS_EFFECTIVE}
    for key, value in ALWAYS_EFFECTIVE.items():
        data = parse_config({"output_dir": "o", "data": {"kind": kind, **LEAST_OF[kind], key: value}}).data
        assert getattr(data, key) == value


def test_a_prepared_set_is_known_by_its_index(tmp_path):
    """And then what has no effect for one is refused."""
    folder = tmp_path / "set"
    folder.mkdir()
    assert DataOptions(path=str(folder)).kind == "folder"
    (folder / INDEX).write_text("{}")
    content = {"output_dir": "o", "data": {"path": str(folder)}}
    assert parse_config(content).data.kind == "prepared"
    assert (
        parse_config({"output_dir": "o", "data": {"path": str(folder), "kind": "folder"}}).data.kind
        == "prepared"
    )
    with refused("data.caption_column", "'text'", expected="data.kind 'prepared'"):
        parse_config({"output_dir": "o", "data": {"path": str(folder), "caption_column": "text"}})


def test_files_that_are_no_recipe(tmp_path):
    with refused("RECIPE", "none.toml', which does not exist", expected="a TOML file"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with refused("RECIPE", "bad.toml' (", expected="valid TOML"):
        load_recipe(tmp_path / "bad.toml")
    for content in (b"\xff\xfe\x00", 'base = "caf\u00e9"'.encode("latin-1")):
        (tmp_path / "bytes.toml").write_bytes(content)
        with refused("RECIPE", "bytes.toml' (", expected="valid TOML in UTF-8", hint="UTF-8"):
            load_recipe(tmp_path / "bytes.toml")
    (tmp_path / "deep.toml").write_text(f"a = {'[' * 9000}")
    with refused("RECIPE", "deep.toml' ("):
        load_recipe(tmp_path / "deep.toml")


def test_a_recipe_may_begin_with_a_mark(recipe):
    recipe.write_bytes(b"\xef\xbb\xbf" + LEAST.encode())
    assert load_recipe(recipe).output_dir == load_run_recipe(recipe).output_dir == "out"


BAD_TEXT = b"caf\xe9".decode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"output_dir": BAD_TEXT}, "output_dir"),
        ({"data": {"path": BAD_TEXT}}, "data.path"),
        ({"data": {"kind": "tars", "shards": ["a.tar", BAD_TEXT]}}, "data.shards.1"),
        ({"data": {"path": "x", "extractor": {"model": BAD_TEXT}}}, "data.extractor.model"),
        ({"adapter": {"method": "prime", "start_from": BAD_TEXT}}, "adapter.start_from"),
        ({BAD_TEXT: 1}, "key"),
        ({"output_dir": "a\0b"}, "output_dir"),
    ],
)
def test_text_that_is_no_unicode(content, key):
    with refused(key, "udce9" if key != "output_dir" else "\\", expected="text in UTF-8"):
        parse_config({"output_dir": "o", "data": {"path": "x"}} | content)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module that registers a method, in the working directory."""
    name = f"own_methods_{tmp_path.name.replace('-', '_')}"
    source = f"""
from nexus_adapters.methods import register_method
from nexus_adapters.methods.t2i import T2IMethod

class Own(T2IMethod):
    label = "Own"

register_method(Own("own-{tmp_path.name}"))
"""
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with METHODS.temporary():
        yield name, f"own-{tmp_path.name}"
    sys.modules.pop(name, None)


@pytest.mark.parametrize("as_file", [False, True])
def test_a_recipe_imports_modules_first(own_module, as_file):
    name, method = own_module
    content = {"output_dir": "o", "data": {"path": "x"}, "adapter": {"method": method, "noise_exponent": 0.5}}
    with refused("adapter.method", repr(method), hint='imports = ["MODULE"]'):
        parse_config(content)
    imported = f"{name}.py" if as_file else name
    config = parse_config(content | {"imports": [imported]})
    assert config.imports == (imported,)
    assert find_method(method).label == "Own"


@pytest.mark.parametrize(
    ("imports", "received"),
    [
        (["no_such_module"], "'no_such_module' (ModuleNotFoundError"),
        (["no_such_file.py"], "'no_such_file.py'"),
        (["broken.py"], "'broken.py' (ZeroDivisionError"),
    ],
)
def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch, imports, received):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which working directories are added
    (tmp_path / "broken.py").write_text("1 / 0")
    with refused("imports", received):
        parse_config({"output_dir": "o", "data": {"path": "x"}, "imports": imports})


@pytest.mark.parametrize("method", ["prime", "evil"])
def test_the_recipe_that_a_run_has_kept_imports_nothing(tmp_path, monkeypatch, method):
    """A folder that somebody else made may be given as `output_dir`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which working directories are added
    names = (f"evil_{tmp_path.name.replace('-', '_')}", "evil.py")
    for name in names:
        file = tmp_path / f"{name.removesuffix('.py')}.py"
        file.write_text("from pathlib import Path\nPath('was-run').touch()\n")
    kept = tmp_path / "run" / "config.toml"
    kept.parent.mkdir()
    content = {"format_version": 2, "output_dir": "run", "imports": names, "data": {"path": "x"}}
    kept.write_text(tomli_w.dumps(content | {"adapter": {"method": method}}))
    mine = parse_config({"output_dir": "run", "data": {"path": "x"}})
    if method == "prime":
        assert load_run_recipe(kept).imports == names
        check_run_folder(mine)
    else:
        hint = 'imports = ["MODULE"]'
        with refused("adapter.method", "'evil'", hint=hint):
            load_run_recipe(kept)
        with refused("output_dir", "adapter.method", hint=hint):
            check_run_folder(mine)
    assert not (tmp_path / "was-run").exists()
    with refused("adapter.method", "'evil'") if method == "evil" else nullcontext():
        load_recipe(kept)  # as a recipe of the user's own
    assert (tmp_path / "was-run").exists()
    for name in names:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_imports_are_a_list():
    with refused("imports", "'json'", expected="a list"):
        parse_config({"output_dir": "o", "data": {"path": "x"}, "imports": "json"})


@pytest.mark.parametrize(
    ("method", "key", "default"), [("t2i", "noise_exponent", 0.0), ("controlnet-xs", "size_ratio", 0.125)]
)
def test_a_default_is_the_same_written_out(method, key, default):
    """Unless what training starts from decides it."""

    def found(**section):
        content = {"output_dir": "o", "data": {"path": "x"}, "adapter": {"method": method, **section}}
        return identity(parse_config(content))

    assert found() == found(**{key: default})
    assert found()[f"adapter.{key}"] == default
    assert found(start_from="a") != found(start_from="a", **{key: default})


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
    for kind in {method.Options for method in METHODS.values()}:
        described = described_fields(kind)
        for field in dataclasses.fields(kind):
            assert described.get(field.name, "").strip().endswith("."), (kind, field.name)


def described_fields(kind):
    """Field -> the string below it, of a class and those that it extends."""
    found = {}
    for cls in [c for c in reversed(kind.__mro__) if c is not object]:
        (body,) = (node.body for node in ast.parse(inspect.getsource(cls)).body)
        for field, text in itertools.pairwise(body):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_text:
                found[field.target.id] = text.value.value
    return found
