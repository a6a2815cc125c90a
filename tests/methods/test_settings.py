import pytest

from nexus_adapters.methods import GenerationSettings, find_method
from nexus_adapters.methods.method import unread_settings

CHANGED = GenerationSettings(0.5, policy="cond_only", level_scales="prompt", noise_exponent=1.0)


@pytest.mark.parametrize(
    ("method", "unread"),
    [
        ("prime", []),
        ("t2i", ["level_scales"]),
        ("controlnet", ["policy", "level_scales", "noise_exponent"]),
        ("controlnet-xs", ["policy", "level_scales", "noise_exponent"]),
    ],
)
def test_what_has_no_effect_is_known(method, unread):
    assert unread_settings(find_method(method), CHANGED) == unread
    assert unread_settings(find_method(method), GenerationSettings()) == []
