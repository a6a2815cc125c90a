import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import T2IAdapter
from safetensors.torch import load_file
from tests import tiny
from tests.refusals import refused

from nexus_adapters import InvalidArgument, files, load_adapter
from nexus_adapters.adapter.formats import export_file
from nexus_adapters.adapter.saved import read_json
from nexus_adapters.adapter.weights import read_header
from nexus_adapters.data.tensor_cache import TensorCache
from nexus_adapters.evaluation.store import Store
from nexus_adapters.files import (
    append_json_lines,
    cache_folder,
    file_sha256,
    files_sha256,
    folder_sha256,
    is_leftover,
    lock,
    locked,
    open_regular,
    read_json_lines,
    read_regular,
    remove_folder,
    remove_unfinished,
    replacing,
    replacing_file,
    replacing_folder,
    save_tensors,
    write_json,
    write_text,
)
from nexus_adapters.training.checkpoint import save_checkpoint


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def fail_in(manager):
    """Writes a half and is interrupted."""
    with manager as place:
        place.write(b"half") if hasattr(place, "write") else (place / "b").write_text("half")
        raise KeyboardInterrupt


class TestWriting:
    def test_a_file_appears_when_it_is_whole(self, tmp_path):
        target = tmp_path / "new" / "a.txt"
        with replacing(target) as stream:
            stream.write(b"whole")
            assert not target.exists()
        assert target.read_bytes() == b"whole"
        assert names(target.parent) == ["a.txt"]

    def test_an_error_leaves_the_old_file_and_nothing_else(self, tmp_path):
        target = tmp_path / "a.txt"
        target.write_bytes(b"old")
        for path in (target, tmp_path / "b.txt"):
            with pytest.raises(KeyboardInterrupt):
                fail_in(replacing(path))
        assert target.read_bytes() == b"old"
        assert names(tmp_path) == ["a.txt"]

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_a_full_disk_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch, call):
        def full(*_):
            raise OSError(28, "No space left on device")

        write_text(tmp_path / "a.txt", "old")
        monkeypatch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space"):
            write_text(tmp_path / "a.txt", "new")
        assert (tmp_path / "a.txt").read_text() == "old"
        assert names(tmp_path) == ["a.txt"]

    def test_a_kill_leaves_the_old_file_and_what_is_removed_later(self, tmp_path):
        code = """
import os, sys
from pathlib import Path
from nexus_adapters.files import replacing, replacing_folder
folder = Path(sys.argv[1])
with replacing(folder / "a.txt") as stream, replacing_folder(folder / "b") as new:
    stream.write(b"half")
    stream.flush()
    (new / "c.txt").write_text("half")
    os.kill(os.getpid(), 9)
"""
        write_text(tmp_path / "a.txt", "old")
        done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
        assert done.returncode == -9
        assert (tmp_path / "a.txt").read_text() == "old"
        left = [name for name in names(tmp_path) if name != "a.txt"]
        assert len(left) == 2
        assert all(is_leftover(name) for name in left)
        remove_unfinished(tmp_path, idle_s=3600)  # somebody may still be writing
        assert len(names(tmp_path)) == 3
        for name in left:
            os.utime(tmp_path / name, (0, 0))
        remove_unfinished(tmp_path, idle_s=3600)
        assert names(tmp_path) == ["a.txt"]

    def test_nothing_that_is_finished_is_taken_for_a_leftover(self, tmp_path):
        write_text(tmp_path / "a.txt", "")
        remove_unfinished(tmp_path)
        remove_unfinished(tmp_path / "missing")
        assert names(tmp_path) == ["a.txt"]
        assert not is_leftover("a.txt")
        assert is_leftover(".lock")

    def test_a_link_stays_and_its_file_is_replaced(self, tmp_path):
        (tmp_path / "real").mkdir()
        write_text(tmp_path / "real" / "a.txt", "old")
        (tmp_path / "a.txt").symlink_to(tmp_path / "real" / "a.txt")
        write_text(tmp_path / "a.txt", "new")
        assert (tmp_path / "a.txt").is_symlink()
        assert (tmp_path / "real" / "a.txt").read_text() == "new"
        assert names(tmp_path / "real") == ["a.txt"]

    def test_it_can_be_written_in_another_folder(self, tmp_path):
        aside = tmp_path / "aside"
        aside.mkdir()
        with replacing(tmp_path / "a.txt", aside) as stream:
            stream.write(b"x")
            assert names(tmp_path) == ["aside"]
            assert len(names(aside)) == 1
        assert names(tmp_path) == ["a.txt", "aside"]
        assert names(aside) == []

    def test_text_is_utf_8_with_its_own_line_ends(self, tmp_path):
        write_text(tmp_path / "a.txt", "größer\r\n\n")
        assert (tmp_path / "a.txt").read_bytes() == "größer\r\n\n".encode()

    def test_json_has_finite_numbers_alone(self, tmp_path):
        write_json(tmp_path / "a.json", {"x": [1, "ö"]}, indent=1)
        assert json.loads((tmp_path / "a.json").read_bytes()) == {"x": [1, "ö"]}
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json(tmp_path / "a.json", {"x": float("nan")})
        assert json.loads((tmp_path / "a.json").read_bytes()) == {"x": [1, "ö"]}

    def test_tensors_are_saved_from_wherever_they_lie(self, tmp_path):
        tensor = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
        save_tensors(tmp_path / "a.safetensors", {"x": tensor}, {"format": "pt"})
        assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], tensor)

    def test_why_tensors_cannot_be_saved_is_an_os_error(self, tmp_path, monkeypatch):
        from safetensors import SafetensorError

        def full(*_):
            raise SafetensorError("No space left on device")

        monkeypatch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match=r"a\.safetensors.*No space left"):
            save_tensors(tmp_path / "a.safetensors", {})
        assert names(tmp_path) == []


class TestFolders:
    def test_a_folder_is_replaced_whole_or_not_at_all(self, tmp_path):
        target = tmp_path / "adapter"
        with replacing_folder(target) as folder:
            (folder / "a").write_text("1")
            assert not target.exists()
        with pytest.raises(KeyboardInterrupt):
            fail_in(replacing_folder(target))
        assert names(target) == ["a"]
        with replacing_folder(target) as folder:
            (folder / "below").mkdir()
            (folder / "below" / "b").write_text("2")
        assert names(target) == ["below"]
        assert names(tmp_path) == ["adapter"]

    def test_a_folder_that_cannot_be_moved_in_stays_as_it_was(self, tmp_path, monkeypatch):
        target = tmp_path / "adapter"
        with replacing_folder(target) as folder:
            (folder / "a").write_text("1")
        real, calls = os.rename, []

        def second_fails(*args):
            calls.append(args)
            if len(calls) == 2:
                raise OSError("no")
            real(*args)

        def fill():
            with replacing_folder(target) as folder:
                (folder / "b").write_text("2")

        monkeypatch.setattr(os, "rename", second_fails)
        with pytest.raises(OSError, match="no"):
            fill()
        assert len(calls) == 3
        assert names(target) == ["a"]
        assert names(tmp_path) == ["adapter"]

    def test_a_link_to_a_folder_stays(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        with replacing_folder(tmp_path / "link") as folder:
            (folder / "a").write_text("1")
        assert (tmp_path / "link").is_symlink()
        assert names(tmp_path / "real") == ["a"]
        assert names(tmp_path) == ["link", "real"]

    def test_a_deletion_leaves_no_half_folder(self, tmp_path, monkeypatch):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x").touch()
        with monkeypatch.context() as patch:
            patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
            remove_folder(tmp_path / "a")
        assert [is_leftover(name) for name in names(tmp_path)] == [True]
        remove_unfinished(tmp_path)
        assert names(tmp_path) == []


class TestModes:
    def expected(self, umask):
        return 0o666 & ~umask

    def test_written_files(self, tmp_path, umask):
        write_text(tmp_path / "a.txt", "x")
        write_json(tmp_path / "a.json", {})
        append_json_lines(tmp_path / "a.jsonl", [1])
        with lock(tmp_path / "a.lock"):
            pass
        assert {mode(path) for path in tmp_path.iterdir()} == {self.expected(umask)}

    def test_a_file_that_only_its_owner_could_read(self, tmp_path, umask):
        (tmp_path / "a.txt").touch(0o600)
        write_text(tmp_path / "a.txt", "x")
        assert mode(tmp_path / "a.txt") == self.expected(umask)

    def test_tensors(self, tmp_path, umask):
        save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
        assert mode(tmp_path / "a.safetensors") == self.expected(umask)

    def test_what_a_library_writes_for_its_user_alone(self, tmp_path, umask):
        with replacing_file(tmp_path / "a") as unfinished:
            (tmp_path / "theirs").touch(0o600)
            (tmp_path / "theirs").replace(unfinished)
        with replacing_folder(tmp_path / "b") as folder:
            (folder / "below").mkdir()
            (folder / "c").touch(0o600)
            (folder / "below" / "d").touch(0o600)
        found = [tmp_path / "a", tmp_path / "b" / "c", tmp_path / "b" / "below" / "d"]
        assert [mode(path) for path in found] == 3 * [self.expected(umask)]
        assert mode(tmp_path / "b") == 0o777 & ~umask


def export_t2i(folder):
    with replacing_folder(folder / "adapter") as place:
        T2IAdapter(channels=[8], num_res_blocks=1, downscale_factor=8).save_pretrained(place)


# What the package writes by libraries that let only the owner read their files.
WRITERS = {
    "a cache's shard": lambda folder: TensorCache(folder).write({"x": {"y": torch.zeros(1)}}),
    "a checkpoint": lambda folder: save_checkpoint(folder, 1, {"module": {"x": torch.zeros(1)}}, {}),
    "an adapter's folder": lambda folder: tiny.adapter(tiny.unet()).save_pretrained(folder / "adapter"),
    "an adapter's file": lambda folder: export_file(tiny.adapter(tiny.unet()), folder / "a.safetensors"),
    "another's adapter": export_t2i,
    "an evaluation's scores": lambda folder: Store(folder, "abc").keep_scores(range(1), {"x": np.zeros(1)}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_others_may_read_what_the_umask_lets_them(tmp_path, umask, name):
    WRITERS[name](tmp_path)
    found = {mode(path) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {0o666 & ~umask}


class TestHashes:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "b" / "c").mkdir(parents=True)
        for name in ("a.txt", "b/c/d.txt", "b.txt"):
            (tmp_path / name).write_text(name)
        return tmp_path

    def test_values(self, folder):
        """They are in cache keys, saved settings and results: other values would make all of those new."""
        assert file_sha256(folder / "a.txt") == hashlib.sha256(b"a.txt").hexdigest()
        both = [folder / "b.txt", folder / "a.txt"]
        assert files_sha256(both) == hashlib.sha256(b"b.txta.txt").hexdigest()
        assert folder_sha256(folder).startswith("b3ea6e7d5bc28abeb36476cf777ec9ce5b5f9c61f9396c0d")
        assert folder_sha256(folder / "a.txt").startswith("1fe5a5015cc3ee3063428b2a486fd51792b57ed43deda6d3")

    def test_a_folders_hash_is_of_names_and_contents(self, folder):
        found = [folder_sha256(folder)]
        (folder / "a.txt").write_text("other")
        found.append(folder_sha256(folder))
        (folder / "a.txt").rename(folder / "e.txt")
        found.append(folder_sha256(folder))
        assert len(set(found)) == 3

    def test_large_files_are_hashed_whole(self, tmp_path):
        content = bytes(range(256)) * 20_000
        (tmp_path / "a").write_bytes(content)
        assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


class TestJsonLines:
    def test_what_was_appended_comes_back(self, tmp_path):
        file = tmp_path / "new" / "a.jsonl"
        assert read_json_lines(file, dict) == []
        append_json_lines(file, [{"x": 1}, {"x": "\u2028ö\n"}])
        append_json_lines(file, [])
        append_json_lines(file, [{"x": None}])
        assert read_json_lines(file, dict) == [{"x": 1}, {"x": "\u2028ö\n"}, {"x": None}]

    @pytest.mark.parametrize(
        "damage", [b'{"x": 2, "y', b"\0\0\0\n", b"\xff\xfe\n", b"[1]\n", b"\n\n", b'{"x": 2']
    )
    def test_lines_that_were_cut_short_are_skipped_and_ended(self, tmp_path, damage):
        file = tmp_path / "a.jsonl"
        append_json_lines(file, [{"x": 1}])
        with file.open("ab") as stream:
            stream.write(damage)
        assert read_json_lines(file, dict) == [{"x": 1}]
        append_json_lines(file, [{"x": 3}])
        assert read_json_lines(file, dict) == [{"x": 1}, {"x": 3}]

    def test_lines_of_another_kind_are_skipped(self, tmp_path):
        append_json_lines(tmp_path / "a.jsonl", [{"x": 1}, [1, 2], 3, "four"])
        assert read_json_lines(tmp_path / "a.jsonl", list) == [[1, 2]]

    def test_what_json_cannot_say_is_not_written(self, tmp_path):
        with pytest.raises(ValueError, match="JSON compliant"):
            append_json_lines(tmp_path / "a.jsonl", [{"x": 1}, {"x": float("inf")}])
        assert not (tmp_path / "a.jsonl").exists()


HOLDER = """
import sys
from pathlib import Path
from nexus_adapters.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


class TestLocks:
    @pytest.fixture
    def holder(self, tmp_path):
        """Another process that holds a folder's lock until its input ends."""
        command = [sys.executable, "-c", HOLDER, tmp_path / "run" / ".lock"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "held\n"
            yield process
            process.stdin.close()

    def test_a_folder_that_another_process_uses_is_refused(self, tmp_path, holder):
        with refused("out", f"'{tmp_path / 'run'}'"), locked(tmp_path / "run", "out"):
            pytest.fail("both have it")
        holder.stdin.close()
        holder.wait()
        with locked(tmp_path / "run", "out"):
            pass

    def test_without_waiting_it_says_who_has_it(self, tmp_path, holder):
        with lock(tmp_path / "run" / ".lock", wait=False) as is_held:
            assert not is_held
        with lock(tmp_path / "other" / "lock", wait=False) as is_held:
            assert is_held

    def test_an_error_releases_it(self, tmp_path):
        for _ in range(2):
            with pytest.raises(KeyError), locked(tmp_path, "out"):
                raise KeyError


@pytest.fixture(params=["pipe", "link to a device", "folder"])
def irregular(request, tmp_path):
    path = tmp_path / "irregular"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    return path


class TestRegularFiles:
    def test_regular_files_and_links_to_them_are_read(self, tmp_path):
        (tmp_path / "a").write_bytes(b"abc")
        (tmp_path / "b").symlink_to("a")
        for name in "ab":
            assert read_regular(tmp_path / name) == read_regular(tmp_path / name, most=3) == b"abc"
        with pytest.raises(OSError, match="more than 2 bytes"):
            read_regular(tmp_path / "a", most=2)

    @pytest.mark.parametrize("read", [open_regular, read_regular, file_sha256])
    def test_others_are_refused_at_once(self, irregular, read):
        with pytest.raises(OSError, match="not a regular file"):
            read(irregular)

    def test_adapter_files_that_are_no_files_are_refused_at_once(self, irregular, tmp_path):
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            folder = tmp_path / name
            folder.mkdir()
            (folder / name).symlink_to(irregular)
            with pytest.raises(InvalidArgument):
                load_adapter(folder)
            for read in (read_json, read_header):
                with pytest.raises(InvalidArgument):
                    read(irregular)


def test_the_cache_is_where_the_user_keeps_such_things(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/nexus-adapters")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/nexus-adapters")


def test_files_need_neither_torch_nor_filelock():
    code = "import sys, nexus_adapters.files; print({'torch', 'filelock'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
