import pickle

import pytest

from nexus_adapters.errors import (
    MISSING,
    InvalidArgument,
    expect,
    mentions,
    one_line,
    redacted,
    renamed,
    shown,
)


def test_it_renders_as_one_line():
    error = InvalidArgument("scale", "a finite number", "'big'", "0 is the base alone")
    assert str(error) == "scale: expected a finite number, got 'big'. 0 is the base alone"
    assert (
        str(InvalidArgument("prompt", hint="It is what to show")) == "prompt is required. It is what to show"
    )
    assert str(InvalidArgument("prompt")) == "prompt is required"
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("received", [MISSING, "'big'", 3])
def test_it_survives_a_process_pool(received):
    error = pickle.loads(pickle.dumps(InvalidArgument("scale", "a number", received, "hint")))
    assert (error.name, error.expected, error.hint) == ("scale", "a number", "hint")
    assert str(error) == str(InvalidArgument("scale", "a number", received, "hint"))


def test_renaming_keeps_all_but_the_name():
    for names in ({"low": "--low"}, lambda name: f"--{name}"):
        with pytest.raises(InvalidArgument) as caught, renamed(names):
            raise InvalidArgument("low", "a number", "x", "hint")
        error = caught.value
        assert (error.name, error.expected, error.received, error.hint) == ("--low", "a number", "x", "hint")
        assert isinstance(error.__cause__, InvalidArgument)
    with pytest.raises(InvalidArgument) as caught, renamed({"high": "--high"}):
        raise InvalidArgument("low", "a number", "x")
    assert caught.value.name == "low"
    with pytest.raises(OSError, match="low"), renamed({"low": "--low"}):
        raise OSError("low")


def test_expecting():
    expect(True, "low", "a number", "x")
    with pytest.raises(InvalidArgument):
        expect(False, "low", "a number", "x")


def test_a_librarys_error_in_one_line():
    assert one_line(OSError("no  such\nfile\n\nHints: a page of them")) == "no such file"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 1000))) == 300
    assert mentions(RuntimeError("CUDA Error: x"), ("cuda error",))
    assert not mentions(RuntimeError("x"), ("cuda error",))


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("'https://me:secret@host/a.tar', which is gone", "'https://host/a.tar', which is gone"),
        ("https://host/a.tar?X-Amz-Signature=secret&x=1 (403)", "https://host/a.tar (403)"),
        ("s3://secret@bucket/x and http://u:secret@h:8080", "s3://bucket/x and http://h:8080"),
        ("https://u:se'cret@secret@host/x", "https://host/x"),
        ("['https://a/b', 'https://u:secret@c/d?secret']", "['https://a/b', 'https://c/d']"),
        ("https://a/@me/x, mail me@b.c, C://x", "https://a/@me/x, mail me@b.c, C://x"),
        ("no URL: a?b@c", "no URL: a?b@c"),
        ("'https:/u:secret@host/x'", "'https:/host/x'"),  # by way of a Path
        ("C:/me@home/x, D:/y@z", "C:/me@home/x, D:/y@z"),
    ],
)
def test_urls_are_shown_without_their_secrets(text, safe):
    assert redacted(text) == shown(text) == safe
    for field in range(3):
        fields = ["data", "a file", "x", ""]
        fields[field + 1] = text
        assert "secret" not in str(InvalidArgument(*fields))
    assert one_line(OSError(text)) == safe


@pytest.mark.parametrize(
    "code", [0, 7, 8, 0x1B, 0x7F, 0x85, 0x9B, 0x200E, 0x202E, 0x2028, 0x2066, 0xD800, 0xFEFF]
)
def test_what_would_steer_a_terminal_is_shown_as_an_escape(code):
    text = str(InvalidArgument("IMAGE", "a file", f"'a{chr(code)}[2Jb'"))
    assert chr(code) not in text
    assert f"{code:02x}" in text
    text.encode()


def test_all_that_can_be_read_stays_as_it_is():
    for text in ("żółć 日本語 👩\u200d🎨 é", "C:\\x\\y", "a\tb\nc"):
        assert shown(text) == text
