import pytest

from nexus_adapters.data.columns import as_captions, no_column


def test_a_missing_column_lists_what_is_there_and_the_nearest():
    error = no_column("caption_column", "captoin", ["file_name", "caption"], "'photos'")
    assert error.name == "caption_column"
    assert error.expected == "a column of 'photos' (file_name, caption)"
    assert error.received == "'captoin'"
    assert error.hint == "Did you mean 'caption'?"
    assert no_column("image_column", "zzz", ["text"], "'a'").hint == ""
    assert "(none)" in no_column("image_column", "zzz", [], "'a'").expected


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ("a", ("a",)),
        ("", ("",)),
        (["a", ""], ("a", "")),
        ([], None),
        (None, None),
        (3, None),
        (["a", 1], None),
    ],
)
def test_captions(value, captions):
    assert as_captions(value) == captions
