import numpy as np
import pytest
from PIL import Image, ImageFilter
from tests.conditions import tiny_models

from nexus_adapters.conditions import extract
from nexus_adapters.evaluation.cases import Case, open_cases
from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.evaluation.scoring import FEATURES, Scorer
from nexus_adapters.training.config import DataOptions


def of_scenes(condition, **changes):
    data = DataOptions(kind="scenes", split="test", count=3, resolution=128, condition=condition)
    return EvaluationConfig(data=data, **changes)


def of_folder(condition, **options):
    return EvaluationConfig(data=DataOptions(path="folder", condition=condition, extractor=options))


def cases(config, tmp_path):
    return open_cases(config, tmp_path, 8)[0:3]


@pytest.mark.parametrize(
    ("condition", "further"), [("canny", set()), ("sketch", {"sketch_ms_ssim"}), ("depth", set())]
)
def test_scenes_are_scored_by_all_that_is_known_of_them(tmp_path, condition, further):
    config = of_scenes(condition)
    chosen = cases(config, tmp_path)
    scores = Scorer(config)([case.picture for case in chosen], chosen)
    common = {"ms_ssim", "binding_color", "binding_material", "background", "edge_f1"}
    assert set(scores) == common | further
    for metric in common:
        assert scores[metric] == pytest.approx(1), metric
        assert scores[metric].shape == (3,)


def test_worse_pictures_score_worse(tmp_path):
    config = of_scenes("sketch")
    chosen = cases(config, tmp_path)
    means = []
    for radius in (0, 2, 6):
        blurred = [case.picture.filter(ImageFilter.GaussianBlur(radius)) for case in chosen]
        means.append({name: values.mean() for name, values in Scorer(config)(blurred, chosen).items()})
    for metric in ("ms_ssim", "edge_f1"):
        assert means[0][metric] > means[1][metric] > means[2][metric], metric
    assert means[0]["sketch_ms_ssim"] > means[1]["sketch_ms_ssim"]


def photo_case(condition, picture):
    return Case("photo", "words", "words", condition, picture)


def test_a_segmentation_is_scored_by_the_extractor_that_drew_it(tmp_path):
    folder = tiny_models.segformer(tmp_path / "model", classes=9)
    options = {"model": folder, "palette": "voc"}
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    condition = extract("segmentation", picture, **options)
    scorer = Scorer(of_folder("segmentation", **options))
    assert scorer([picture], [photo_case(condition, picture)])["mean_iou"] == pytest.approx(1)
    other = Image.new("RGB", (64, 64), (0, 0, 0))
    assert scorer([picture], [photo_case(other, picture)])["mean_iou"] < 1


def test_depth_is_scored_by_error_and_order(tmp_path):
    folder = tiny_models.dpt(tmp_path / "model")
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    condition = extract("depth", picture, model=folder)
    scorer = Scorer(of_folder("depth", model=folder))
    scores = scorer([picture], [photo_case(condition, picture)])
    assert scores["depth_rmse"] == pytest.approx(0, abs=1e-6)
    assert scores["depth_rank_correlation"] == pytest.approx(1)
    inverted = Image.fromarray(255 - np.asarray(condition))
    assert scorer([picture], [photo_case(inverted, picture)])["depth_rank_correlation"] == pytest.approx(-1)


def test_clip_gives_scores_and_features(tmp_path):
    folder = tiny_models.clip(tmp_path / "clip")
    config = of_scenes("canny", clip=folder, features=folder)
    chosen = cases(config, tmp_path)
    scores = Scorer(config)([case.picture for case in chosen], chosen)
    assert scores["clip_score"].shape == (3,)
    assert (np.abs(scores["clip_score"]) <= 1).all()
    assert scores[FEATURES].shape[0] == 3


def test_a_judge_without_an_extractor_for_the_map_is_refused():
    with pytest.raises(ValueError, match="judge: expected none without an extractor for pose; received"):
        Scorer(EvaluationConfig(data=DataOptions(path="x", condition="pose"), judge={"model": "m"}))
