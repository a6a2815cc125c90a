import pytest
from tests.refusals import refused

from nexus_adapters.data.samples import BadSample
from nexus_adapters.data.tar_index import TarIndex
from nexus_adapters.data.tar_samples import CAPTIONS, CONDITION, IMAGE, Layout, check_columns, group_members

PLAIN = Layout.of(None, None, None)


def index(*names, is_whole=True):
    return TarIndex("", 0, is_whole, [(name, number * 1000, number) for number, name in enumerate(names)])


def grouped(*names, layout=PLAIN, is_whole=True):
    samples = group_members(index(*names, is_whole=is_whole), layout)
    parts = [
        [samples.place(row, part) for part in (IMAGE, CONDITION, CAPTIONS)]
        for row in range(len(samples.stems))
    ]
    return dict(zip(samples.stems, parts, strict=True))


def test_layouts():
    assert Layout(("jpg", "jpeg", "png", "webp"), None, "txt", None) == PLAIN
    assert Layout.of("PNG", ".canny.png", "json:text") == Layout(("png",), "canny.png", "json", "text")
    assert Layout.of(None, "png", "caption.txt") == Layout(
        ("jpg", "jpeg", "webp"), "png", "caption.txt", None
    )


def test_files_of_one_stem_are_a_sample():
    layout = Layout.of(None, "canny.png", None)
    assert grouped("a/0.jpg", "a/0.canny.png", "a/0.txt", "b/0.jpg", layout=layout) == {
        "a/0": [(0, 0), (1000, 1), (2000, 2)],
        "b/0": [(3000, 3), None, None],
    }
    apart = grouped("0.TXT", "1.txt", "v1.5/1.jpeg", "0.JPG", "0.png", "1.png")
    assert apart == {
        "0": [(3000, 3), None, (0, 0)],  # the jpg before the png
        "1": [(5000, 5), None, (1000, 1)],
        "v1.5/1": [(2000, 2), None, None],
    }


def test_names_without_stem_or_extension_are_no_samples():
    assert grouped("README", "a/.hidden.jpg", ".DS_Store", "./._0.jpg", "./0.jpg") == {
        "./0": [(4000, 4), None, None]
    }


def test_unsafe_names_are_names():
    assert list(grouped("/etc/0.jpg", "../../0.jpg", "C:\\0.jpg")) == ["/etc/0", "../../0", "C:\\0"]


def test_the_last_of_one_name_counts():
    assert grouped("0.jpg", "0.txt", "0.jpg") == {"0": [(2000, 2), None, (1000, 1)]}


def test_where_a_tar_ends_early_its_last_sample_is_there_if_it_is_whole():
    assert list(grouped("0.jpg", "0.txt", "1.jpg", is_whole=False)) == ["0"]
    assert list(grouped("0.jpg", "0.txt", "1.jpg", "1.txt", is_whole=False)) == ["0", "1"]
    assert list(grouped("0.jpg", "1.jpg", "1.txt", is_whole=False)) == ["0", "1"]
    assert grouped("0.jpg", is_whole=False) == grouped() == {}


@pytest.mark.parametrize(
    ("names", "layout", "argument", "received", "expected", "hint"),
    [
        ([], PLAIN, "shards", None, "samples, such as 00012.jpg with 00012.txt", ""),
        (["0.gif", "0.txt"], PLAIN, "image_column", "'jpg'", "(gif, txt)", ""),
        (["0.jpg", "0.json"], PLAIN, "caption_column", "'txt'", "(jpg, json)", ""),
        (
            ["0.jpg", "0.txt", "0.cany.png"],
            Layout.of(None, "canny.png", None),
            "condition_column",
            "'canny.png'",
            "cany.png",
            "Did you mean 'cany.png'?",
        ),
    ],
)
def test_missing_columns(names, layout, argument, received, expected, hint):
    with refused(argument, received, expected=expected, hint=hint):
        check_columns([group_members(index(*names), layout), group_members(index(), layout)], layout)


def test_one_shard_may_lack_what_another_has():
    check_columns([group_members(index(*names), PLAIN) for names in (["0.jpg"], ["0.txt"], [])], PLAIN)


def test_captions_of_texts_and_json():
    keyed = Layout.of(None, None, "json:text")
    assert PLAIN.read_captions(b" two\nlines \n", "a") == ("two\nlines",)
    assert keyed.read_captions(b'{"text": "a"}', "a") == ("a",)
    assert keyed.read_captions(b'{"text": ["a", ""]}', "a") == ("a", "")
    for bad in (b"{", b"[]", b"3", b'{"other": "a"}', b'{"text": 3}', b'{"text": []}', b"[" * 100_000):
        with pytest.raises(
            BadSample, match=r"^captions: expected a JSON object .* 'text', got something else in 'a'$"
        ):
            keyed.read_captions(bad, "a")
