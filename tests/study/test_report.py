import hashlib

import numpy as np
import pytest
from PIL import Image
from tests.refusals import refused

from nexus_adapters.cli import main
from nexus_adapters.evaluation.estimates import Measured
from nexus_adapters.study.plan import OWN, Cell
from nexus_adapters.study.report import (
    Chosen,
    cells_to_show,
    choose,
    cost_figure,
    generate_chosen,
    images_figure,
    metrics_figure,
)
from nexus_adapters.study.results import CellResult, load_result, results_of


def result(value, **facts):
    return CellResult({}, facts, {OWN: Measured({"edge_f1": np.full(4, value)}, {})}, {})


@pytest.fixture
def results():
    return {
        Cell("canny", "base", 0): result(0.1),
        Cell("canny", "t2i", 0): result(0.5, parameters=1e6, gmacs=0.1),
        Cell("canny", "prime", 0): result(0.6, parameters=2e6, gmacs=0.2),
        Cell("canny", "prime", 1): result(0.8, parameters=2e6, gmacs=0.2),
        Cell("depth", "prime", 0): result(0.4, parameters=2e6, gmacs=0.2),
    }


def colors_at(panel, marker):
    return {line.get_color() for line in panel.lines if line.get_marker() == marker}


def test_costs_are_of_every_method_in_one_color(results):
    figure = cost_figure(results)
    weights, multiplications, weights_of_depth, _ = figure.axes
    dots = sorted(tuple(line.get_xydata()[0]) for line in weights.lines if line.get_marker() == "o")
    assert dots == [(1.0, 0.5), (2.0, pytest.approx(0.7))]
    assert {float(line.get_xdata()[0]) for line in multiplications.lines} == {0.1, 0.2}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["t2i", "prime"]
    of_depth = colors_at(weights_of_depth, "o")
    assert len(of_depth) == 1
    assert of_depth < colors_at(weights, "o")


def test_the_base_alone_costs_nothing(results):
    figure = cost_figure({Cell("canny", "base", 0): results[Cell("canny", "base", 0)]})
    assert not figure.axes[0].lines


def test_more_methods_take_more_room(results):
    lines = {Cell("canny", f"m{n}", 0): result(0.5, parameters=1e6) for n in range(12)}
    figure = metrics_figure(results | lines)
    canny, depth = (panel.get_position().height for panel in figure.axes)
    assert canny > 2 * depth


def measured(**scores):
    return Measured({name: np.array(values, dtype=float) for name, values in scores.items()}, {})


def test_the_best_median_and_worst_are_chosen_against_the_other():
    found = {
        "base": measured(binding_color=[1, 1, 1, 1, 1], edge_f1=[1, 1, 1, 1, 1]),
        "t2i": measured(binding_color=[0.5, 0.5, 0.5, 0.5, 0.5], edge_f1=[0.4, 0.4, 0.4, 0.4, 0.4]),
        "prime": measured(binding_color=[0.5, 1.0, 0.0, 0.6, 0.7], edge_f1=[0.4, 0.8, 0.2, 0.4, 0.4]),
        "slim": measured(binding_color=[0, 0, 0, 0, 0], edge_f1=[0, 0, 0, 0, 0]),
    }
    chosen = choose(found, "t2i", 1)  # the base is no adapter, and slim is worse than prime
    assert [(each.place, each.why) for each in chosen] == [
        (1, "prime best vs. t2i"),
        (3, "prime median vs. t2i"),
        (2, "prime worst vs. t2i"),
    ]


def test_without_another_a_method_is_chosen_by_its_own_merit():
    chosen = choose({"base": measured(ms_ssim=[0.1, 0.9, 0.5])}, "t2i", 2)
    assert [(each.place, each.why) for each in chosen] == [
        (1, "base best"),
        (2, "base median"),
        (0, "base worst"),
    ]  # three samples have no more than one of each


def test_samples_that_were_not_measured_are_not_shown():
    chosen = choose({"prime": measured(ms_ssim=[np.nan, 0.9, 0.5, 0.1])}, "", 1)
    assert [each.place for each in chosen] == [1, 2, 3]


def test_the_sheet_shows_the_images_of_the_evaluation(finished):
    """Which were generated in batches: they differ by rounding alone."""
    chosen = [Chosen(place, "") for place in (2, 0)]
    cells = {method: Cell("canny", method, 0) for method in ("base", "prime+per_branch")}
    generated = generate_chosen(finished, cells, chosen)
    assert list(generated) == list(cells)
    for method, images in generated.items():
        (stored,) = (finished.folder / "evaluations").glob(f"canny-{method}-0@own-*")
        for each, image in zip(chosen, images, strict=True):
            (file,) = stored.glob(f"{method}/**/*{each.place}.png")
            assert np.abs(np.asarray(image, int) - np.asarray(Image.open(file), int)).max() <= 2


def test_a_sheet_per_condition_is_written(finished, tmp_path):
    command = ["study", str(finished.path), "--out", str(tmp_path), "--report", "--images", "1"]
    assert main(command) == 0
    with Image.open(tmp_path / "tiny-images-canny.webp") as sheet:
        assert min(sheet.size) > 300


def test_a_negative_number_is_refused(finished, tmp_path, capsys):
    assert main(["study", str(finished.path), "--out", str(tmp_path), "--images", "-1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--images: " in line
    assert line.endswith("-1")


def test_images_are_of_the_adapters_that_were_measured(finished, tmp_path, capsys):
    """Whatever is in the run's folder now."""
    file = finished.run_folder(Cell("canny", "prime", 0)) / "adapter" / "diffusion_pytorch_model.safetensors"
    before, results = file.read_bytes(), results_of(finished)
    found = hashlib.sha256(before + b" ").hexdigest()[:8]
    try:
        file.write_bytes(before + b" ")
        with refused(
            "images",
            f"{found} in '{finished.run_folder(Cell('canny', 'prime', 0))}'",
            expected=hashlib.sha256(before).hexdigest()[:8],
        ):
            images_figure(finished, results, "canny", 1)
        file.unlink()
        with refused("images", "none", expected="canny-prime-0"):
            images_figure(finished, results, "canny", 1)
        assert main(["study", str(finished.path), "--out", str(tmp_path), "--report", "--images", "1"]) == 2
        assert "--images: " in capsys.readouterr().err.splitlines()[-1]
    finally:
        file.write_bytes(before)


def shown_cells(finished, *cells):
    """What a sheet shows where these cells have results."""
    result = load_result(finished.results, Cell("canny", "prime", 0))
    return list(cells_to_show(finished, dict.fromkeys(cells, result), "canny").values())


def test_a_sheet_is_of_the_seed_that_most_methods_have_here(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(finished, "folder", tmp_path)
    base, *trained = (
        Cell("canny", method, seed)
        for method, seed in (("base", 0), ("t2i", 0), ("t2i", 1), ("prime", 0), ("prime", 1), ("prime", 2))
    )
    for cell in (trained[0], trained[1], trained[3], trained[4]):
        finished.run_folder(cell).mkdir(parents=True)
    shown = shown_cells(finished, base, *trained, Cell("depth", "t2i", 0))
    assert shown == [base, Cell("canny", "t2i", 1), Cell("canny", "prime", 1)]


def test_a_sheet_without_any_run_is_refused(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(finished, "folder", tmp_path)
    with refused("images", f"'{tmp_path / 'runs'}'", expected="canny"):
        shown_cells(finished, Cell("canny", "base", 0), Cell("canny", "t2i", 0))
    assert shown_cells(finished, Cell("canny", "base", 0)) == [Cell("canny", "base", 0)]


def test_a_study_of_losses_has_no_images(finished, tmp_path, capsys):
    plan = tmp_path / "losses.toml"
    text = finished.path.read_text()
    kept = text[: text.index("[evaluate]")] + text[text.index("[methods.t2i]") :]
    plan.write_text(
        kept.replace('evaluate.policy = "per_branch"', "").replace(
            "recipe.toml", str(finished.path.parent / "recipe.toml")
        )
    )
    assert main(["study", str(plan), "--out", str(tmp_path / "out"), "--images", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--images: " in line
    assert "[evaluate]" in line


def test_three_samples_are_the_least():
    with refused("images", "2", expected="at least 3 measured samples"):
        choose({"prime": measured(ms_ssim=[0.9, np.nan, 0.1])}, "", 1)
