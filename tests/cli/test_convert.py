"""`nexus convert`: formats in, ours out."""

import errno
import json
import os
import zipfile

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tests import tiny
from tests.adapter.test_formats import as_original, nexus, same, t2i

from nexus_adapters.adapter.arguments import ARGUMENTS
from nexus_adapters.adapter.formats import import_adapter
from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.adapter.saved import find_saved
from nexus_adapters.adapter.weights import read_header
from nexus_adapters.bundled import BUNDLED
from nexus_adapters.cli import main
from nexus_adapters.training.checkpoint import save_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(tmp_path):
    nexus("slim").save_pretrained(tmp_path / "slim")
    (tmp_path / "slim" / "training.json").write_text(json.dumps({"config": {"base.path": "sd/base"}}))
    return tmp_path / "slim"


def test_into_a_file_and_back_into_a_folder(source, tmp_path, capsys):
    file, folder = tmp_path / "slim.safetensors", tmp_path / "again"
    assert main(["convert", str(source), str(file), "--to", "single-file"]) == 0
    assert capsys.readouterr().out == f"{file}: slim-paper, from a NexusAdapter\n"
    with safe_open(file, framework="pt") as stored:
        told = stored.metadata()
    assert (told["variant"], told["format_version"]) == ("slim-paper", "1")
    assert told["training.base"] == "sd/base"
    assert len(told["training"]) == len(told["sha256"]) == 64
    assert "text width 768" in told["base"]
    assert main(["convert", str(file), str(folder)]) == 0
    assert same(NexusAdapter.from_pretrained(folder), nexus("slim"))
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_a_weights_file_with_its_config_next_to_it(source, tmp_path, capsys):
    """The folder's adapter, with what the folder records."""
    file = tmp_path / "slim.safetensors"
    assert main(["convert", str(source / WEIGHTS), str(file), "--to", "single-file"]) == 0
    assert read_header(file).metadata["training.base"] == "sd/base"
    assert capsys.readouterr().err == ""
    (source / "config.json").unlink()
    assert main(["convert", str(source / WEIGHTS), str(tmp_path / "again")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "SOURCE" in line
    assert "config.json" in line


def test_the_start_of_a_slim(tmp_path, capsys):
    torch.save(as_original(t2i()), tmp_path / "t2i.pth")
    options = ["--variant", "slim", "--text-width", "1024", "--seed", "4"]
    assert main(["convert", str(tmp_path / "t2i.pth"), str(tmp_path / "slim"), *options]) == 0
    printed = capsys.readouterr()
    assert "slim, from a T2I-Adapter" in printed.out
    assert "from first to last, is 0.9" in printed.err
    assert "note: its norms and attention are newly initialized" in printed.err
    assert "least-squares fit" in printed.err
    expected = import_adapter(tmp_path / "t2i.pth", "slim", text_width=1024, seed=4).adapter
    assert same(NexusAdapter.from_pretrained(tmp_path / "slim"), expected)


@pytest.mark.parametrize(
    ("options", "variant", "zero_init"),
    [
        ([], "prime", True),
        (["--residual"], "prime", True),
        (["--no-zero-init"], "prime", False),
        (["--no-residual"], "prime-paper", False),
        (["--variant", "slim-paper"], "slim-paper", False),
    ],
)
def test_the_name_decides_the_form(tmp_path, capsys, options, variant, zero_init):
    t2i().save_pretrained(tmp_path / "t2i")
    assert main(["convert", str(tmp_path / "t2i"), str(tmp_path / "new"), *options]) == 0
    shown = capsys.readouterr()
    assert f"new: {variant}, from a T2I-Adapter" in shown.out
    assert ("its features equal those of the T2I-Adapter" in shown.err) == zero_init
    made = NexusAdapter.from_pretrained(tmp_path / "new")
    assert (made.variant, made.config["zero_init"]) == (variant, zero_init)


def test_the_releases_adapters_stay_in_the_papers_form(tmp_path, capsys):
    torch.save(nexus("prime").state_dict(), tmp_path / "release.pth")
    given = ["convert", str(tmp_path / "release.pth"), str(tmp_path / "new")]
    assert main(given) == 2
    assert "--variant prime-paper" in capsys.readouterr().err
    assert main([*given, "--variant", "prime-paper"]) == 0
    assert "new: prime-paper, from an adapter of the public release" in capsys.readouterr().out
    assert NexusAdapter.from_pretrained(tmp_path / "new").config["residual"] is False


@pytest.mark.parametrize(("name", "condition"), [("slim", "depth"), ("prime-paper", "canny")])
def test_adapters_of_the_package(tmp_path, name, condition):
    assert main(["convert", name, str(tmp_path / "new"), "--condition", condition]) == 0
    expected = BUNDLED["embedded"].adapter(name, condition)
    stored = load_file(tmp_path / "new" / WEIGHTS)
    assert find_saved(tmp_path / "new").sha256() == find_saved(expected).sha256()  # float16, as it is
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_a_saved_pipeline(source, tmp_path):
    source.rename(tmp_path / "adapter")
    (tmp_path / "model_index.json").write_text("{}")
    assert main(["convert", str(tmp_path), str(tmp_path / "new")]) == 0
    assert same(NexusAdapter.from_pretrained(tmp_path / "new"), nexus("slim"))


def test_a_hub_id(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / name[3:]))
    assert main(["convert", "me/slim", str(tmp_path / "new")]) == 0
    assert "new: slim-paper, from a NexusAdapter" in capsys.readouterr().out


@pytest.fixture
def write_run(tmp_path):
    """Writes a training run with one checkpoint, whose average has other weights than the module."""

    def write(adapter, method, base="nowhere", own_config=True):
        run = tmp_path / "run"
        run.mkdir()
        (run / "config.toml").write_text(f'[base]\npath = "{base}"\n[adapter]\nmethod = "{method}"\n')
        module = {name: 2 * tensor for name, tensor in adapter.state_dict().items()}
        state = {"adapter": json.loads(adapter.to_json_string())} if own_config else {}
        tensors = {"module": module, "average": adapter.state_dict()}
        return save_checkpoint(run / "checkpoints", 3, tensors, state)

    return write


def test_a_run_and_its_checkpoint(write_run, tmp_path, capsys):
    checkpoint = write_run(nexus("slim"), "slim-paper")
    for number, source in enumerate((tmp_path / "run", checkpoint)):
        assert main(["convert", str(source), str(tmp_path / f"new{number}")]) == 0
        assert f"new{number}: slim-paper, from a NexusAdapter" in capsys.readouterr().out
        assert same(NexusAdapter.from_pretrained(tmp_path / f"new{number}"), nexus("slim"))
    nexus("prime").save_pretrained(tmp_path / "run" / "adapter")  # the run has finished
    (tmp_path / "run" / "adapter" / "training.json").write_text('{"config": {"base.path": "sd/base"}}')
    file = tmp_path / "finished.safetensors"
    assert main(["convert", str(tmp_path / "run"), str(file), "--to", "single-file"]) == 0
    assert same(import_adapter(file).adapter, nexus("prime"))
    assert read_header(file).metadata["training.base"] == "sd/base"


def test_a_checkpoint_from_before_they_had_a_config(write_run, tmp_path, capsys):
    tiny.sd15().save_pretrained(tmp_path / "base")
    adapter = tiny.adapter(tiny.unet(), variant="slim-paper")
    checkpoint = write_run(adapter, "slim-paper", base=tmp_path / "base", own_config=False)
    assert main(["convert", str(checkpoint), str(tmp_path / "new")]) == 0
    assert "new: slim-paper, from a NexusAdapter" in capsys.readouterr().out
    assert same(NexusAdapter.from_pretrained(tmp_path / "new"), adapter)
    (tmp_path / "base" / "model_index.json").unlink()
    assert main(["convert", str(checkpoint), str(tmp_path / "again")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("nexus convert: error: SOURCE: ")
    assert str(tmp_path / "base") in errors


def test_a_checkpoint_in_the_first_format_whose_run_took_over_an_architecture(write_run, tmp_path, capsys):
    """The recipe has none of it, and two heads look like one."""
    tiny.sd15().save_pretrained(tmp_path / "base")
    start = tiny.adapter(tiny.unet(), variant="slim-paper", heads=2, head_width=6, noise_exponent=0.5)
    start.save_pretrained(tmp_path / "start")
    trained = tiny.adapter(tiny.unet(), variant="slim-paper", heads=2, head_width=6, noise_exponent=0.5)
    checkpoint = write_run(trained, "slim-paper", base=tmp_path / "base", own_config=False)
    with (tmp_path / "run" / "config.toml").open("a") as recipe:
        recipe.write(f'start_from = "{tmp_path / "start"}"\n')
    assert main(["convert", str(checkpoint), str(tmp_path / "new")]) == 0
    found = NexusAdapter.from_pretrained(tmp_path / "new").config
    assert {name: found[name] for name in ARGUMENTS} == {name: trained.config[name] for name in ARGUMENTS}
    (tmp_path / "start").rename(tmp_path / "gone")
    assert main(["convert", str(checkpoint), str(tmp_path / "again")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("nexus convert: error: SOURCE: ")
    assert f"'{tmp_path / 'start'}'" in errors
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("own_config", [True, False])
def test_a_t2i_adapters_checkpoint_starts_a_nexus_adapter(write_run, tmp_path, capsys, own_config):
    checkpoint = write_run(t2i(), "t2i", own_config=own_config)
    assert main(["convert", str(checkpoint), str(tmp_path / "new"), "--seed", "2"]) == 0
    assert "new: prime, from a T2I-Adapter" in capsys.readouterr().out
    t2i().save_pretrained(tmp_path / "t2i")
    expected = import_adapter(tmp_path / "t2i", seed=2).adapter
    assert same(NexusAdapter.from_pretrained(tmp_path / "new"), expected)


def test_nothing_is_overwritten(source, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    (tmp_path / "there.safetensors").write_text("mine")
    for dest, options in (("there", []), ("there.safetensors", ["--to", "single-file"])):
        assert main(["convert", str(source), str(tmp_path / dest), *options]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("nexus convert: error: DEST: ")
        assert f"'{tmp_path / dest}'" in errors
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(source), str(tmp_path / "empty")]) == 0


@pytest.mark.parametrize(
    ("arguments", "name", "shown"),
    [
        (["nowhere", "{tmp}/x"], "SOURCE", "'nowhere'"),
        (["./prime", "{tmp}/x"], "SOURCE", "'./prime'"),
        (["prime", "{tmp}/x", "--condition", "pose"], "--condition", "'pose'"),
        (["{source}", "{tmp}/no/x"], "DEST", "/no/x'"),
        (["{source}", "{tmp}/x.safetensors"], "DEST", "--to single-file"),
        (["{source}", "{tmp}/x", "--to", "single-file"], "DEST", "/x'"),
        (["{source}", "{tmp}/x", "--variant", "slim-paper", "--zero-init"], "--zero-init", "slim-paper"),
        (["{source}", "{tmp}/x", "--no-residual", "--zero-init"], "--zero-init", "prime-paper"),
        (["{source}", "{tmp}/x", "--variant", "prime-paper", "--residual"], "--residual", "True"),
        (["{source}", "{tmp}/x", "--text-width", "0"], "--text-width", "0"),
        (["{tmp}", "{tmp}/x"], "SOURCE", "{tmp}'"),
    ],
)
def test_bad_input_is_one_line(source, tmp_path, capsys, arguments, name, shown):
    given = [argument.format(source=source, tmp=tmp_path) for argument in arguments]
    assert main(["convert", *given]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"nexus convert: error: {name}: ")
    assert shown.format(tmp=tmp_path) in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(["", "x"], "SOURCE"), (["prime", ""], "DEST"), (["prime", "x", "--seed", "-1"], "--seed")],
)
def test_empty_names_and_seeds_below_0_are_refused(tmp_path, monkeypatch, capsys, arguments, name):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == 2
    assert f"nexus convert: error: {name}: expected " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    def fail(self, folder, **_):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(NexusAdapter, "save_pretrained", fail)
    assert main(["convert", str(source), str(tmp_path / "x")]) == 1
    assert "disk full" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slim"]


@pytest.mark.parametrize("content", ["{", "[]", '{"config": 3}', "null"])
def test_a_damaged_record_of_the_training_is_one_line(source, tmp_path, capsys, content):
    (source / "training.json").write_text(content)
    assert main(["convert", str(source), str(tmp_path / "x.safetensors"), "--to", "single-file"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nexus convert: error: SOURCE: ")
    assert "training.json'" in line
    assert not (tmp_path / "x.safetensors").exists()


def full_disk(monkeypatch, place):
    """No space is left when `place` is reached, as libraries and the system report it."""

    def fail(*args, **kwargs):
        if place == "tensors":  # as safetensors has it
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere")

    places = {
        "tensors": ("safetensors.torch.save_file",),  # where diffusers looks it up, too
        "config": ("diffusers.configuration_utils.ConfigMixin.save_config",),
        "hash": ("nexus_adapters.adapter.weights.shutil.copyfileobj",),
        "sync": ("nexus_adapters.files.os.fsync",),
        "folder": ("nexus_adapters.files.Path.mkdir",),
        "file": ("nexus_adapters.files.Path.touch",),
        "rename": ("nexus_adapters.files.Path.rename", "nexus_adapters.files.os.replace"),
    }
    for name in places[place]:
        monkeypatch.setattr(name, fail)


@pytest.mark.parametrize(
    ("to", "place"),
    [
        *(("folder", place) for place in ("tensors", "config", "hash", "sync", "folder", "file", "rename")),
        *(("single-file", place) for place in ("tensors", "hash", "sync", "file", "rename")),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(source, tmp_path, monkeypatch, capsys, place, to):
    dest = tmp_path / ("x.safetensors" if to == "single-file" else "x")
    mine = [f".{dest.name}.unfinished", f".unfinished-{dest.name}", f"{dest.name}.tmp"]
    for name in mine:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    with monkeypatch.context() as patch:
        full_disk(patch, place)
        assert main(["convert", str(source), str(dest), "--to", to]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nexus convert: error: cannot write '{dest}': ")
    assert "No space left on device" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, "slim"])
    assert main(["convert", str(source), str(dest), "--to", to]) == 0
    assert all((tmp_path / name / "mine.txt").read_text() == "mine" for name in mine)
    if to == "folder":
        assert sorted(path.name for path in dest.iterdir()) == ["config.json", WEIGHTS]


@pytest.mark.parametrize("part", ["data/0", "data/3", "data.pkl", "version"])
def test_a_wrong_checksum_in_a_pickle_is_refused(tmp_path, capsys, part):
    """torch itself does not compare them."""
    file = tmp_path / "t2i.pth"
    torch.save(t2i(channels=[8, 8, 8, 8]).state_dict(), file)
    with zipfile.ZipFile(file) as archive:
        entry = archive.getinfo(f"t2i/{part}")
        place = file.read_bytes().index(archive.read(entry), entry.header_offset)
    content = bytearray(file.read_bytes())
    content[place + entry.file_size - 1] ^= 2
    file.write_bytes(content)
    for command in (["convert", str(file), str(tmp_path / "new")], ["info", str(file)]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"'{file}'" in line
        assert part in line
    assert [path.name for path in tmp_path.iterdir()] == ["t2i.pth"]


@pytest.mark.parametrize(
    "option",
    [["--variant", "prime"], ["--text-width", "16"], ["--no-residual"], ["--zero-init"], ["--seed", "3"]],
)
def test_what_a_source_decides_itself_cannot_be_given(source, tmp_path, capsys, option):
    assert main(["convert", str(source), str(tmp_path / "out"), *option]) == 2
    line = capsys.readouterr().err.strip()
    name = option[0].replace("--no-residual", "--residual")
    assert line.startswith(f"nexus convert: error: {name}: ")
    assert "\n" not in line
    assert not (tmp_path / "out").exists()
