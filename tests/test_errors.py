import pickle

import pytest

from nexus_adapters.errors import MISSING, InvalidArgument, expect, mentions, one_line, renamed


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
