import pytest
from tests.refusals import refused

from nexus_adapters.errors import renamed
from nexus_adapters.generation.requests import ControlRequest, ExtractorOptions, GenerateRequest, MapSource

MAP = MapSource("map.png")


@pytest.mark.parametrize(
    ("values", "name", "received"),
    [
        ({"scale": float("nan")}, "scale", "nan"),
        ({"start": -0.1}, "start", "-0.1"),
        ({"start": 0.6, "end": 0.5}, "end", "0.5"),
        ({"noise_exponent": -1.0}, "noise_exponent", "-1.0"),
        ({"balance": "prompt", "policy": "positive"}, "balance", "'prompt' and `policy`"),
        ({"given": MapSource("map.png", ExtractorOptions(low=3))}, "low", "3"),
        ({"given": MapSource("map.png", ExtractorOptions(pairs=("unit=mm",)))}, "option unit", "'mm'"),
    ],
)
def test_a_control_checks_its_values(values, name, received):
    with refused(name, received):
        ControlRequest(**{"given": MAP, **values})


@pytest.mark.parametrize(
    ("values", "name", "received"),
    [
        ({"controls": ()}, "controls", "none"),
        ({"guidance": float("inf")}, "guidance", "inf"),
        ({"steps": 0}, "steps", "0"),
        ({"seed": -1}, "seed", "-1"),
        ({"seed": 2**32}, "seed", "4294967296"),
        ({"scheduler": "best"}, "scheduler", "'best'"),
        ({"width": 100}, "width", "100"),
        ({"height": -8}, "height", "-8"),
        ({"width": 8008, "height": 8000}, "width and height", "8008x8000"),
        ({"width": 100_000, "height": 100_000}, "width and height", "100000x100000"),
    ],
)
def test_a_request_checks_its_values(values, name, received):
    with refused(name, received):
        GenerateRequest(**{"prompt": "a", "controls": (ControlRequest(MAP),), "guidance": 3.0, **values})


def test_a_surface_renames_what_an_error_mentions():
    with refused("End", "0.5", expected="from Start, 0.6"), renamed(str.capitalize):
        ControlRequest(MAP, start=0.6, end=0.5)
