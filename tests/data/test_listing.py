import os
import unicodedata

import pytest
from tests.refusals import refused

from nexus_adapters.data.ignored import Ignored
from nexus_adapters.data.listing import check_inside, find_path, leaves_folder, list_files


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_links_to_folders_and_files_are_followed_once(tmp_path):
    root, other = tmp_path / "set", tmp_path / "other"
    touch(root, "a.png", "sub/b.png", ".hidden/c.png")
    touch(other, "d.png", "deep/e.png")
    (root / "again").symlink_to("sub")  # the same folder under another name
    (root / "back").symlink_to(".")
    (other / "deep" / "up").symlink_to(root)
    (root / "far").symlink_to(other)
    (root / "link.png").symlink_to(other / "d.png")
    (root / "gone.png").symlink_to("nowhere.png")
    ignored = Ignored()
    assert list_files(root, ignored) == {
        "a.png": False,
        "far/d.png": False,
        "far/deep/e.png": False,
        "link.png": True,
        "sub/b.png": False,
    }
    assert "links to folders that have already been read: 3 (again, back, far/deep/up)" in str(ignored)
    assert "broken links: 1 (gone.png)" in str(ignored)


def test_pipes_and_devices_are_not_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    ignored = Ignored()
    assert list_files(tmp_path, ignored) == {}
    assert "devices, pipes or sockets: 2" in str(ignored)


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "ünï/café.png") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("there", "named"),
    [
        (COMPOSED, DECOMPOSED),
        (DECOMPOSED, COMPOSED),
        ("sub/a.png", "sub\\a.png"),
        (DECOMPOSED, COMPOSED.replace("/", "\\")),
        ("odd\\name.png", "odd\\name.png"),  # as it is, where there is such a file
    ],
)
def test_names_of_other_systems_are_found(tmp_path, there, named):
    touch(tmp_path, there)
    assert find_path(tmp_path, named) == there
    assert find_path(tmp_path / "nowhere", named, {there}) == there
    assert find_path(tmp_path, "sub\\gone.png") == "sub\\gone.png"


@pytest.mark.parametrize("path", ["/etc/a", "../a", "b/../../a", "C:\\a", "..\\a", "\\\\server\\a"])
def test_paths_that_lead_out(path):
    assert leaves_folder(path)


@pytest.mark.parametrize("path", ["a", "b/a", "b\\a", "..a", "b/..a/c"])
def test_paths_that_stay(path):
    assert not leaves_folder(path)


def test_texts_that_are_links_stay_in_the_folder_or_in_a_linked_one(tmp_path):
    root, linked = tmp_path / "set", tmp_path / "linked"
    touch(root, "a.txt")
    touch(linked, "b.txt")
    touch(tmp_path, "secret.txt")
    (root / "inner.txt").symlink_to("a.txt")
    (root / "sub").symlink_to(linked)
    (linked / "beside.txt").symlink_to("b.txt")
    (root / "outer.txt").symlink_to(tmp_path / "secret.txt")
    (linked / "outer.txt").symlink_to("../secret.txt")
    for name in ("a.txt", "inner.txt", "sub/b.txt", "sub/beside.txt"):
        check_inside(root / name, root, "folder", allow_outside=False)
    for name in ("outer.txt", "sub/outer.txt"):
        with refused("folder", str(root / name), hint="allow_outside"):
            check_inside(root / name, root, "folder", allow_outside=False)
        check_inside(root / name, root, "folder", allow_outside=True)


def test_what_is_ignored_is_one_line_with_counts_and_names():
    ignored = Ignored()
    assert not ignored
    assert str(ignored) == ""
    for number in range(5):
        ignored.add("odd files", f"{number}\n.odd")
    ignored.add("broken links", "b")
    assert str(ignored) == "odd files: 5 (0?.odd, 1?.odd, 2?.odd, ...); broken links: 1 (b)"
    with pytest.warns(
        UserWarning, match=r"^'here': ignored odd files: 5 .*; broken links: 1 \(b\)$"
    ) as caught:
        ignored.report("here")
    assert len(caught) == 1
