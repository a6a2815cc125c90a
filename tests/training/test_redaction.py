"""Secrets and folders of the machine stay out of what is written and published."""

import json
from dataclasses import asdict, replace

import pytest
from huggingface_hub import HfApi
from tests import tiny
from tests.refusals import refused
from tests.training.runs import SMALL_UNET, run, write_images

from nexus_adapters.errors import MISSING
from nexus_adapters.training.recipe import parse_config
from nexus_adapters.training.redaction import without_folders, without_secrets

SIGNED = "https://me:secret@host/a/b-{00..09}.tar?X-Amz-Signature=secret"


def test_urls_lose_user_password_and_query():
    made = parse_config({"output_dir": "o", "data": {"kind": "tars", "shards": [SIGNED, "/home/me/c.tar"]}})
    assert without_secrets(made).data.shards == ("https://host/a/b-{00..09}.tar", "/home/me/c.tar")
    assert without_folders(made).data.shards == ("https://host/a/b-{00..09}.tar", "c.tar")


def test_nothing_in_a_published_folder_names_a_folder_of_the_machine(tmp_path):
    root = tmp_path / "secret-folder"
    tiny.sd15(unet=tiny.unet(**SMALL_UNET)).save_pretrained(root / "base")
    write_images(root / "images")
    first = run(root, root / "first", training__max_train_steps=1)
    changes = {"adapter__start_from": str(first), "validation__every_steps": 1, "validation__images": 1}
    changes["log__every_steps"] = 1
    folder = run(root, root / "out", training__max_train_steps=1, **changes)
    for path in folder.rglob("*"):
        assert b"secret-folder" not in path.read_bytes(), path


PLACES = ("/home/zoe/x/depth", "~/x/depth", "../x/depth", r"C:\Users\zoe\x\depth", "/home/zoe/x/depth/")


@pytest.mark.parametrize("place", PLACES)
def test_no_path_of_a_recipe_is_published_with_its_folders(place):
    """Also of files that are gone by then, such as a mount's."""
    content = {
        "output_dir": place,
        "base": {"path": place, "config": place},
        "adapter": {"method": "prime", "start_from": place},
        "data": {"path": place, "condition": "depth", "extractor": {"model": place}},
        "cache": {"folder": place},
    }
    made = without_folders(replace(parse_config(content), imports=(place,)))
    found = json.dumps(asdict(made))
    assert "zoe" not in found
    assert "x/" not in found
    assert made.data.extractor == {"model": "depth"}
    assert made.base.path == "depth"


def test_ids_of_the_hub_and_prompts_stay(tmp_path):
    content = {
        "output_dir": "out",
        "base": {"path": "owner/base"},
        "data": {"path": "owner/data", "kind": "table", "condition": "depth", "extractor": {"model": "a/b"}},
        "validation": {"prompts": ["/imagine a cat"]},
    }
    made = without_folders(parse_config(content))
    assert (made.base.path, made.data.path, made.data.extractor["model"]) == (
        "owner/base",
        "owner/data",
        "a/b",
    )
    assert made.validation.prompts == ("/imagine a cat",)


def test_the_token_is_the_environments_and_in_no_file(root, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *_, **__: seen.append(self.token))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **_: "https://hub")
    run(root, tmp_path / "out", hub__repo_id="me/adapter", training__max_train_steps=1)
    assert seen == ["hf_verysecret"]
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"verysecret" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("repo", "token", "name", "received"),
    [("a/b/c", "t", "hub.repo_id", "'a/b/c'"), ("me/adapter", None, "HF_TOKEN", MISSING)],
)
def test_the_hub_is_checked_before_anything_else(tmp_path, monkeypatch, repo, token, name, received):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with refused(name, received):
        run(tmp_path, tmp_path / "out", hub__repo_id=repo)
    assert not (tmp_path / "out").exists()


def test_a_hub_that_refuses_leaves_the_adapter_where_it_is(root, tmp_path, monkeypatch):
    def refuses(*_, **__):
        raise RuntimeError("403 Forbidden\n\nand much more")

    monkeypatch.setenv("HF_TOKEN", "t")
    monkeypatch.setattr(HfApi, "create_repo", refuses)
    with pytest.raises(OSError, match=r"^hub.repo_id: .*'me/a' \(403 Forbidden\)$"):
        run(root, tmp_path / "out", hub__repo_id="me/a", training__max_train_steps=1)
    assert (tmp_path / "out" / "adapter" / "config.json").is_file()
