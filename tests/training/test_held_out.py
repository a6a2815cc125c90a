"""Which samples a run holds out for its validation."""

import warnings

import pytest
from tests.refusals import refused
from tests.training.runs import config, run

from nexus_adapters.data.conditioned import ConditionedSource
from nexus_adapters.data.crop import Geometry
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.training.config import DataOptions
from nexus_adapters.training.recipe_samples import Split, split_samples
from nexus_adapters.training.run import dry_run


def held_out(count, wanted, batch_size):
    samples = ConditionedSource(SceneSource(count), Geometry(128, 128), "canny")
    split = split_samples(samples, DataOptions(kind="scenes", count=count), 0, wanted, batch_size)
    assert len(split.trained) + len(split.held_out) == split.total == count
    assert not {*split.trained} & {*split.held_out}
    return len(split.held_out)


@pytest.mark.parametrize(
    ("count", "wanted", "batch_size", "expected"),
    [
        (3, 32, 1, 1),
        (6, 32, 1, 2),
        (9, 32, 2, 3),
        (12, 32, 8, 4),  # as many as images are generated
        (12, 2, 8, 2),
        (12, 0, 8, 0),
        (9, 32, 8, 1),  # a batch is left
        (39, 32, 8, 4),
        (60, 32, 8, 6),  # a tenth
        (500, 32, 8, 32),
        # Where not one can be spared.
        (2, 32, 1, 0),
        (8, 32, 8, 0),
    ],
)
def test_how_many_are_held_out(count, wanted, batch_size, expected):
    assert held_out(count, wanted, batch_size) == expected


VALIDATED = {"validation__every_steps": 2, "validation__images": 1}


@pytest.mark.parametrize(
    ("held_out", "trained", "wanted", "is_same"),
    [
        (3, 27, 32, True),
        (4, 27, 32, False),
        (2, 10, 2, False),
        (2, 38, 2, True),
        (0, 12, 4, False),
        (0, 9, 4, True),
        (0, 12, 0, True),
    ],
)
def test_which_splits_are_those_of_earlier_versions(held_out, trained, wanted, is_same):
    split = Split(dict.fromkeys(range(trained), ""), dict.fromkeys(range(90, 90 + held_out), ""), [])
    assert split.is_as_before(wanted) == is_same


@pytest.mark.parametrize("count", [2, 3])
def test_a_run_that_cannot_validate_says_so(root, tmp_path, count, capsys):
    changes = VALIDATED | {"data__count": count, "training__max_train_steps": 1}
    with pytest.warns(UserWarning, match=f"^validation: turned off, .* {count} samples"):
        dry_run(config(root, tmp_path / "out", **changes, training__batch_size=count))
    for key, value in (("early_stop_patience", 2), ("select", "best")):
        others = changes | {f"validation__{key}": value, "training__batch_size": count}
        with refused(f"validation.{key}", f"{count} samples"):
            run(root, tmp_path / "out", **others)
    assert not (tmp_path / "out").exists()


def test_a_run_says_how_many_are_held_out(root, tmp_path, capsys):
    changes = VALIDATED | {"data__count": 12, "validation__images": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(root, tmp_path / "out", **changes)
        said = dry_run(config(root, tmp_path / "dry", **changes))
    assert "validation: 4 of 12 samples are held out" in capsys.readouterr().err
    assert "4 of 12 samples are held out" in said
    assert "held out" not in dry_run(config(root, tmp_path / "dry", data__count=12))
