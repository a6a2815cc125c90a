import numpy as np
import pytest
from PIL import Image, ImageFilter
from tests.conditions import tiny_models
from tests.refusals import refused

from nexus_adapters.conditions import EXTRACTORS, Extractor, canny, extract, register_condition
from nexus_adapters.evaluation.cases import Case, open_cases
from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.evaluation.scoring import FEATURES, Scorer, scoring_sha256
from nexus_adapters.metrics import METRICS, Metric, register_metric
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
    scores = Scorer(config)([case.original for case in chosen], chosen)
    common = {"ms_ssim", "binding_color", "binding_material", "background", "edge_f1"}
    assert set(scores) == common | further
    for metric in common:
        assert scores[metric] == pytest.approx(1), metric
        assert scores[metric].shape == (3,)


def test_worse_images_score_worse(tmp_path):
    config = of_scenes("sketch")
    chosen = cases(config, tmp_path)
    means = []
    for radius in (0, 2, 6):
        blurred = [case.original.filter(ImageFilter.GaussianBlur(radius)) for case in chosen]
        means.append({name: values.mean() for name, values in Scorer(config)(blurred, chosen).items()})
    for metric in ("ms_ssim", "edge_f1"):
        assert means[0][metric] > means[1][metric] > means[2][metric], metric
    assert means[0]["sketch_ms_ssim"] > means[1]["sketch_ms_ssim"]


def photo_case(condition, picture):
    return Case("photo", "words", "words", condition, picture)


def test_a_segmentation_is_scored_by_the_extractor_of_its_map(tmp_path):
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
    scores = Scorer(config)([case.original for case in chosen], chosen)
    assert scores["clip_score"].shape == (3,)
    assert (np.abs(scores["clip_score"]) <= 1).all()
    assert scores[FEATURES].shape[0] == 3


def test_a_judge_without_an_extractor_for_the_map_is_refused():
    with refused("judge", received="{'model': 'm'}", expected="'pose'"):
        Scorer(EvaluationConfig(data=DataOptions(path="x", condition="pose"), judge={"model": "m"}))


@pytest.fixture
def forgotten():
    """What a test registers is forgotten again."""
    with EXTRACTORS.temporary(), METRICS.temporary():
        yield


def test_a_registered_metric_is_computed_of_every_image(tmp_path, forgotten):
    seen = []

    def redness(generated):
        seen.append(generated)
        return np.asarray(generated.image)[..., 0].mean() / 255

    register_metric(Metric("redness", function=redness))
    register_metric(Metric("of_depth", function=lambda _: 1.0, applies_to=("depth",)))
    config = of_scenes("canny")
    chosen = cases(config, tmp_path)
    images = [Image.new("RGB", (128, 128), (red, 0, 0)) for red in (0, 51, 255)]
    scores = Scorer(config)(images, chosen)
    assert scores["redness"].tolist() == pytest.approx([0, 0.2, 1])
    assert "of_depth" not in scores
    for generated, image, case in zip(seen, images, chosen, strict=True):
        assert generated.image is image
        assert generated.original is case.original
        assert generated.condition is case.condition
        assert generated.caption == case.words
    assert "of_depth" in Scorer(of_scenes("depth"))(images, cases(of_scenes("depth"), tmp_path))


@pytest.mark.parametrize("value", [float("nan"), None, "high"])
def test_a_metric_that_gives_no_finite_number_is_named(tmp_path, forgotten, value):
    register_metric(Metric("mine", function=lambda _: value))
    config = of_scenes("canny")
    chosen = cases(config, tmp_path)
    with refused("metric mine", received=repr(value)):
        Scorer(config)([case.original for case in chosen], chosen)


def test_images_are_scored_anew_where_a_metric_of_ones_own_is_added(forgotten):
    before = scoring_sha256(of_scenes("canny"))
    register_metric(Metric("mine", function=lambda _: 1.0, applies_to=("canny",)))
    assert scoring_sha256(of_scenes("canny")) != before
    assert scoring_sha256(of_scenes("sketch")) == before


def test_a_registered_condition_is_scored_by_its_own_comparison(forgotten):
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    register_condition(
        Extractor("mine", canny, "", compare=lambda found, wanted: {"mine": float(found == wanted)})
    )
    register_condition(Extractor("bare", canny, ""))
    scores = Scorer(of_folder("mine"))([picture], [photo_case(canny(picture), picture)])
    assert set(scores) == {"ms_ssim", "mine"}
    assert scores["mine"] == 1
    assert set(Scorer(of_folder("bare"))([picture], [photo_case(picture, picture)])) == {"ms_ssim"}
    with refused("judge", received="{'auto': True}", expected="'bare'"):
        Scorer(EvaluationConfig(data=DataOptions(path="x", condition="bare"), judge={"auto": True}))
    with refused("data.extractor", received="'colour'"):
        Scorer(of_folder("mine", colour=1.0))
    with refused("data.extractor.auto", received="3"):
        Scorer(of_folder("mine", auto=3))
