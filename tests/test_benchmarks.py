"""Benchmarks run in miniature: three by default, all with `-m full`. What they measure is not tested."""

import csv
import hashlib
import json
import shutil
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.weights import use_weights, write_tiny

from nexus_adapters import load_adapter
from nexus_adapters.bundled import weights_folder
from nexus_adapters.conditions import canny
from nexus_adapters.conditions.resize import resize_map
from nexus_adapters.embedded.held_out import SCENE_METRICS, load_test_scenes
from nexus_adapters.embedded.scene import SIZE
from nexus_adapters.metrics.structure import edge_f1

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Condition -> what the results have always called its adapters: the names of their folders.
STORED = {
    "canny": {"t2i", "prime", "slim", "prime-residual", "slim-residual"},
    **{condition: {"prime-residual", "slim-residual"} for condition in ("depth", "segmentation", "sketch")},
}


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark by name, as if it had been started from its folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    yield import_module
    torch.set_num_threads(threads)


def run(module, out, *options):
    out.mkdir(exist_ok=True)
    module.main(["--quick", "--out", str(out), *options])
    (written,) = out.glob("*.json")
    result = json.loads(written.read_text())
    assert set(result) == {"settings", "measured", "machine", "versions"}
    assert result["machine"]["torch_threads"] == torch.get_num_threads()
    assert result["machine"]["cpu"]
    assert result["versions"]["torch"] == version("torch")
    return written.stem, result["measured"]


@pytest.mark.full
def test_adapter_forward(benchmark, tmp_path):
    name, measured = run(benchmark("adapter_forward"), tmp_path, "--threads", "1", "--skip-memory")
    assert name == "adapter_forward"
    assert set(measured) == {"t2i", "prime", "slim"}
    for found in measured.values():
        assert found["forward_ms"]["low"] <= found["forward_ms"]["median"] <= found["forward_ms"]["high"]
        assert found["time_ratio_to_t2i"]["median"] > 0
    assert measured["t2i"]["time_ratio_to_t2i"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert measured["prime"]["parameters"] > measured["slim"]["parameters"] > 0


@pytest.mark.full
def test_blocks(benchmark, tmp_path, monkeypatch):
    module = benchmark("blocks")
    blocks = ("gate", "gate-level", "film", "twice")
    name, measured = run(module, tmp_path, "--blocks", *blocks)
    assert name == "blocks"
    sizes = {cell: found["facts"]["parameters"] for cell, found in measured["cells"].items()}
    assert set(sizes) == {f"canny-{variant}+{block}-0" for variant in module.VARIANTS for block in blocks}
    for variant in module.VARIANTS:
        plain = sizes[f"canny-{variant}+gate-level-0"]
        assert sizes[f"canny-{variant}+gate-0"] > plain
        assert all(0.9 < sizes[f"canny-{variant}+{block}-0"] / plain < 1.1 for block in blocks)
    rows = list(csv.DictReader((tmp_path / "blocks.csv").open()))
    assert {f"canny-{row['method']}-{row['seed']}" for row in rows} == set(sizes)
    assert "| prime+residual+film | 0 |" in (tmp_path / "blocks.md").read_text()
    monkeypatch.setattr(module, "run_study", None)
    run(module, tmp_path / "none", "--blocks")  # reports what is done, and trains nothing


@pytest.mark.full
def test_ways(benchmark, tmp_path):
    module = benchmark("ways")
    folder = ("--folder", str(tmp_path / "pictures"))
    name, measured = run(module, tmp_path, "--conditions", "sketch", *folder)
    assert name == "ways"
    assert list(measured) == ["sketch"]
    assert set(measured["sketch"]) == STORED["sketch"]
    for told in measured["sketch"].values():
        for metric, apart in told["minus_default"].items():
            assert apart["low"] <= apart["value"] <= apart["high"]
            assert apart["n"] == 2
            assert metric in told["default"]
    assert {folder.name for folder in (tmp_path / "pictures").iterdir()} == {
        f"sketch-{way}" for way in module.WAYS
    }


@pytest.mark.full
def test_peak_memory_is_that_of_a_process_of_its_own(benchmark):
    assert 50 < benchmark("adapter_forward").peak_memory_mib("prime", threads=1, quick=True) < 4000


def test_adapter_forward_measures_the_real_sizes(benchmark):
    module = benchmark("adapter_forward")
    with torch.device("meta"):
        counts = {
            m: sum(p.numel() for p in module.build(m, module.SD15).parameters()) for m in module.METHODS
        }
    assert counts == {"t2i": 77_369_280, "prime": 85_817_600, "slim": 59_288_960}


def test_timings_are_of_the_papers_configurations(benchmark):
    """As they were when the results' labels were given."""
    module = benchmark("adapter_forward")
    for label in ("prime", "slim"):
        assert module.build(label, module.TINY).variant == f"{label}-paper"
    assert benchmark("training_cost").METHOD == "prime-paper"
    assert benchmark("sd15_step").METHODS == {
        "t2i": "t2i",
        "slim": "slim-paper",
        "prime": "prime-paper",
        "controlnet-xs": "controlnet-xs",
        "controlnet": "controlnet",
    }


def test_labels_of_the_results_say_which_configuration_it_is(benchmark):
    names = benchmark("machine").embedded_adapters
    for condition, stored in STORED.items():
        assert set(names(condition)) == stored
        for label, name in names(condition).items():
            if label != "t2i":
                config = load_adapter(name, condition).config
                assert config.residual == label.endswith("-residual")
                assert (config.groups > 1) == label.startswith("slim")
    for label, name in benchmark("canny").NEXUS.items():
        config = load_adapter(name).config
        assert config.residual == label.endswith("+residual")
        assert (config.groups > 1) == label.startswith("slim")
    assert benchmark("ways").ADAPTERS == {"prime-residual": "prime", "slim-residual": "slim"}


@pytest.mark.full
def test_hook(benchmark, tmp_path):
    name, measured = run(benchmark("hook"), tmp_path, "--threads", "1", "--steps", "3")
    assert name == "hook"
    assert set(measured) == {"step_alone_ms", "positive", "per_branch"}
    for policy in ("positive", "per_branch"):
        found = measured[policy]
        assert 0 < found["hook_ms"]["median"] < found["step_ms"]["median"]
        # The first step also runs the adapter.
        assert found["hook_with_adapter_in_first_step_ms"]["median"] > found["hook_ms"]["median"]


def test_hook_measures_sd15s_unet(benchmark):
    with torch.device("meta"):
        unet = benchmark("hook").build_pipeline(benchmark("hook").SD15_UNET).unet
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964


def test_scenes(benchmark, tmp_path):
    name, measured = run(benchmark("scenes"), tmp_path)
    assert name == "scenes"
    assert {"draw", "render", "canny", "depth", "segmentation", "sketch", "caption", "score"} < set(measured)
    assert measured["draw_render_all_maps_scenes_per_s"] > 0
    assert measured["draw_render_canny_scenes_per_s"] > 0


def test_quick_runs_leave_the_results_alone(benchmark, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark("machine"), "RESULTS", tmp_path)
    benchmark("scenes").main(["--quick"])
    assert '"settings"' in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_embedded_design(benchmark, tmp_path):
    name, measured = run(benchmark("embedded_design"), tmp_path)
    assert name == "embedded_design"
    f1 = measured["edge_f1_by_latent_noise"]
    assert f1["0.0"] > f1["0.3"] > 0
    assert measured["probe_accuracy_color_at_shape_token"] > 0.5


@pytest.mark.full
def test_embedded_training(benchmark, tmp_path):
    name, measured = run(benchmark("embedded_training"), tmp_path)
    assert name == "embedded_training"
    assert set(measured["psnr_db_by_start"]) == {"orthogonal", "default"}
    for ratio in ("fused_to_plain", "bfloat16_to_float32"):
        assert measured["unet_training_step"][ratio]["median"] > 0
    losses = measured["base_loss_by_optimizer"]
    assert set(losses) == {"muon", "adamw"}
    assert losses["muon"]["500"] != losses["adamw"]["500"]


@pytest.mark.full
def test_training_cost(benchmark, tmp_path):
    name, measured = run(benchmark("training_cost"), tmp_path)
    assert name == "training_cost"
    assert set(measured) == {"sd15", "embedded"}
    for found in measured.values():
        assert found["samples_per_s_to_plain"]["median"] > 0
        assert found["plain_peak_mib"] > 200
        assert found["ours_peak_mib"] > 200


@pytest.mark.full
def test_memory_format(benchmark, tmp_path):
    name, measured = run(benchmark("memory_format"), tmp_path)
    assert name == "memory_format"
    assert set(measured) == {"2 rows", "8 rows", "100 rows"}
    assert all(found["channels_last_to_contiguous"]["median"] > 0 for found in measured.values())


@pytest.fixture
def tiny_weights(monkeypatch, tmp_path):
    use_weights(monkeypatch, write_tiny(tmp_path / "weights"))


@pytest.mark.full
def test_canny(benchmark, tmp_path, tiny_weights):
    module, out = benchmark("canny"), tmp_path / "out"
    options = ["--scenes", "3", "--steps", "1", "--out", str(out), "--cache", str(tmp_path / "cache")]
    module.main(options)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(files) == {"canny.csv", "canny_text.csv", "canny.json", "canny.md"}
    rows = list(csv.DictReader(files["canny.csv"].decode().splitlines()))
    assert list(rows[0]) == list(module.FIELDS)
    assert {(row["n"], row["seed"]) for row in rows} == {("3", "0")}
    cells = {(row["method"], row["policy"]) for row in rows}
    assert len(cells) == 3 + 2 * len(module.NEXUS)
    assert len(rows) == (2 * len(cells) - 1) * len(module.SCENE_METRICS)
    for method in module.NEXUS:
        positive, per_branch = (
            [row["value"] for row in rows if (row["method"], row["policy"]) == (method, policy)]
            for policy in module.POLICIES
        )
        assert positive != per_branch
    table = files["canny.md"].decode().splitlines()
    assert len(table) == 2 + len(cells)
    assert all(line.count("|") == table[0].count("|") for line in table)
    settings = json.loads(files["canny.json"])
    for name, digest in settings["tables_sha256"].items():
        assert hashlib.sha256(files[name]).hexdigest() == digest
    assert len(settings["tables_sha256"]) == 3
    assert set(settings["share_of_all_objects"]) == {" ".join(cell) for cell in cells}
    swapped = list(csv.DictReader(files["canny_text.csv"].decode().splitlines()))
    assert {row["method"] for row in swapped} == set(module.NEXUS)
    assert {row["metric"] for row in swapped} >= {"binding_color", "binding_color_minus_own_prompt"}
    measured = sorted((tmp_path / "cache").iterdir())
    before = [path.stat().st_mtime_ns for path in measured]
    module.main(options)  # everything is in the cache
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").iterdir())] == before
    assert (out / "canny.csv").read_bytes() == files["canny.csv"]


def test_a_cell_of_other_weights_code_or_settings_is_measured_again(benchmark, tmp_path, monkeypatch):
    module = benchmark("canny")
    drawn = []
    monkeypatch.setattr(module, "score_images", lambda *_: dict.fromkeys(module.SCENE_METRICS, np.ones(1)))
    parts = {
        "scenes": [None],
        "sampling": module.Sampling(),
        "base_hash": "a",
        "code_hash": {"adapter": "b"},
        "cache": tmp_path,
    }
    bench = module.Bench(**parts)
    others = [
        (bench, "t2i", "positive", "y"),
        (bench, "t2i", "per_branch", "x"),
        (bench, "prime", "positive", "x"),
        *(
            (module.Bench(**parts | changed), "t2i", "positive", "x")
            for changed in (
                {"base_hash": "c"},
                {"code_hash": {"adapter": "c"}},
                {"sampling": module.Sampling(steps=3)},
                {"scenes": [None, None]},
            )
        ),
    ]
    for each, *cell in [(bench, "t2i", "positive", "x"), *others]:
        for _ in range(2):
            each.measure(*cell, lambda: drawn.append(1))
    assert len(drawn) == 1 + len(others)


def test_differences_are_paired_and_to_the_reference(benchmark):
    module = benchmark("canny")
    ours, theirs = np.array([1.0, 0.5, 0.0]), np.array([0.5, 0.0, 0.25])
    cell = {("prime", "positive"): dict.fromkeys(module.SCENE_METRICS, ours)}
    rows = module.rows_of(cell, {"t2i": dict.fromkeys(module.SCENE_METRICS, theirs)}, seed=4)
    found = {row["metric"]: row for row in rows}
    assert len(found) == 2 * len(module.SCENE_METRICS)
    assert found["edge_f1"]["value"] == 0.5
    difference = found["edge_f1_minus_t2i"]
    assert (difference["value"], difference["n"], difference["seed"]) == (0.25, 3, 4)
    # Of the differences themselves, (0.5, 0.5, -0.25), whose means cannot leave these ends.
    assert -0.25 <= difference["low"] < 0.25 < difference["high"] <= 0.5


def test_shares_of_all_objects_weigh_scenes_by_their_objects(benchmark):
    scenes = benchmark("canny").load_test_scenes(12)
    counts = np.array([len(scene.scene.objects) for scene in scenes])
    bound = (counts == 4).astype(float)  # all objects of scenes of four, none of the others
    scores = {"binding_color": bound, "binding_material": np.ones(12)}
    found = benchmark("canny").bound_objects({("prime", "positive"): scores}, scenes)
    share = round(4 * bound.sum() / counts.sum(), 4)
    assert found == {"prime positive": {"binding_color": share, "binding_material": 1.0}}
    assert share > bound.mean()


def test_the_text_is_swapped_for_the_adapter_alone(benchmark, tiny_weights, monkeypatch):
    """Every scene gets another's prompt, and the base keeps the own."""
    module = benchmark("canny")
    scenes = module.load_test_scenes(3)
    bench = module.Bench(scenes, module.Sampling(steps=1), "", {}, Path("unused"))
    calls = []
    monkeypatch.setattr(module, "generate", lambda *args: calls.append(args))
    monkeypatch.setattr(module.Bench, "measure", lambda self, method, policy, digest, draw: draw())
    module.measure_swapped_text(bench)
    assert len(calls) == len(module.NEXUS)
    for _, _, drawn, _, settings in calls:
        assert drawn == scenes
        assert settings.adapter_prompts == [scenes[1].prompt, scenes[2].prompt, scenes[0].prompt]
    assert len({scene.prompt for scene in scenes}) == 3


@pytest.fixture
def trainings(benchmark, tmp_path, tiny_weights):
    """What a study leaves, of two seeds each, with weights unlike the package's."""
    for condition, methods in STORED.items():
        for method in methods:
            for seed in (0, 3):
                name = f"{condition}-{benchmark('chosen').TRAINED_AS[method]}-{seed}"
                folder = tmp_path / "runs" / name / "adapter"
                shutil.copytree(weights_folder() / condition / method, folder)
                file = folder / "diffusion_pytorch_model.safetensors"
                tensors = {n: tensor.float() * (1 + seed) / 2 for n, tensor in load_file(file).items()}
                save_file(tensors, file)
    return tmp_path / "runs"


@pytest.mark.full
def test_chosen(benchmark, tmp_path, trainings, monkeypatch):
    use_weights(monkeypatch, shutil.copytree(weights_folder(), tmp_path / "package"))
    module, out = benchmark("chosen"), tmp_path / "out"
    monkeypatch.setattr(module, "SCENES", 2)
    monkeypatch.setattr(module, "STEPS", 1)
    options = [str(trainings), "--out", str(out), "--cache", str(tmp_path / "cache"), "--install"]
    module.main(options)
    written = (out / "chosen.json").read_text()
    settings, measured = (json.loads(written)[key] for key in ("settings", "measured"))
    assert set(measured["form"]) == {"prime", "slim"}
    names = benchmark("machine").embedded_adapters
    for condition, methods in STORED.items():
        assert set(settings["package_sha256"][condition]) == methods
        assert set(measured["seed"][condition]) == set(methods)
        for method, seed in measured["seed"][condition].items():
            assert set(measured["scores"][condition][method]) == {"0", "3"}
            run_of_it = trainings / f"{condition}-{module.TRAINED_AS[method]}-{seed}" / "adapter"
            digest = hashlib.sha256((run_of_it / module.WEIGHTS).read_bytes()).hexdigest()
            assert settings["trainings_sha256"][condition][method][str(seed)] == digest
            trained = load_file(run_of_it / module.WEIGHTS)
            name = names(condition)[method]
            shipped = load_adapter(name, condition, dtype=torch.float16).state_dict()
            assert all(torch.equal(shipped[name], tensor.half()) for name, tensor in trained.items())
            assert str(tmp_path) not in (weights_folder() / condition / method / "config.json").read_text()
        assert sorted(path.name for path in (weights_folder() / condition).iterdir()) == sorted(methods)
    monkeypatch.setattr(module, "generate", None)  # what was measured is not measured again
    module.main(options)
    assert json.loads((out / "chosen.json").read_text())["measured"] == measured


@pytest.mark.full
def test_a_miniature_of_chosen_installs_nothing(benchmark, trainings, capsys):
    with pytest.raises(SystemExit):
        benchmark("chosen").main(["--quick", "--install", str(trainings)])
    told = capsys.readouterr().err.splitlines()[-1]
    assert "--install: " in told
    assert "--quick" in told


@pytest.mark.full
def test_chosen_asks_for_trainings_of_all_methods(benchmark, trainings, capsys):
    for folder in trainings.glob("depth-prime*"):
        shutil.rmtree(folder)
    with pytest.raises(SystemExit):
        benchmark("chosen").main(["--quick", str(trainings)])
    told = capsys.readouterr().err.splitlines()[-1]
    assert "RUNS: " in told
    assert "depth-prime+" in told
    assert "depth-slim+" not in told


def test_trainings_are_chosen_by_color_and_edges(benchmark):
    module = benchmark("chosen")

    def by_seed(*scores):
        return {seed: {"binding_color": c, "edge_f1": edges} for seed, (c, edges) in enumerate(scores)}

    canny = {
        "t2i": by_seed((0.3, 0.4), (0.3, 0.4)),
        "prime": by_seed((0.9, 0.6), (0.1, 0.6), (0.1, 0.6)),  # the best training, and the worse form
        "prime-residual": by_seed((0.5, 0.5), (0.6, 0.5), (0.5, 0.7)),
        "slim": by_seed((0.4, 0.5)),
        "slim-residual": by_seed((0.5, 0.4)),
    }
    merits = {"canny": canny, "depth": {"slim-residual": {2: canny["slim"][0], 1: canny["slim"][0]}}}
    assert module.better_forms(merits) == {"prime": "prime-residual", "slim": "slim"}
    assert module.best_seeds(merits) == {
        "canny": {"t2i": 0, "prime": 0, "prime-residual": 2, "slim": 0, "slim-residual": 0},
        "depth": {"slim-residual": 1},
    }


@pytest.mark.full
def test_guidance(benchmark, tmp_path, tiny_weights):
    out = tmp_path / "out"
    module = benchmark("guidance")
    name, measured = run(module, out)
    assert name == "guidance"
    found = measured["scores"]
    assert set(found) == STORED["canny"]
    for by_scale in found.values():
        assert set(by_scale) == {f"{scale:g}" for scale in module.GUIDANCE_SCALES}
        assert all(set(scores) == set(SCENE_METRICS) for scores in by_scale.values())
    assert len({json.dumps(scores) for by_scale in found.values() for scores in by_scale.values()}) > 1
    assert measured["guidance_scale"] in module.GUIDANCE_SCALES


def test_the_guidance_scale_is_chosen_by_color_and_edges(benchmark):
    module = benchmark("guidance")

    def by_scale(colors, edges):
        scales = (f"{scale:g}" for scale in module.GUIDANCE_SCALES)
        found = zip(scales, colors, edges, strict=True)
        return {scale: {"binding_color": color, "edge_f1": edge} for scale, color, edge in found}

    one = by_scale((0.9, 0.2, 0.8, 0.8), (0.5, 0.5, 0.1, 0.5))
    other = by_scale((0.1, 0.7, 0.8, 0.1), (0.5, 0.5, 0.1, 0.5))
    best_of_colors, best_of_both = "3", "1.5"
    assert module.best_scale({"one": one, "other": other}) == best_of_both != best_of_colors


@pytest.mark.full
def test_balances(benchmark, tmp_path, tiny_weights):
    module = benchmark("balances")
    name, measured = run(module, tmp_path)
    assert name == "balances"
    assert [(tuple(row["level_scales"]), row["policy"]) for row in measured["rows"]] == module.CANDIDATES
    for row in measured["rows"]:
        assert 0 <= row["edge_f1"]["low"] <= row["edge_f1"]["value"] <= row["edge_f1"]["high"] <= 1


@pytest.mark.full
def test_prepare(benchmark, tmp_path):
    name, measured = run(benchmark("prepare"), tmp_path)
    assert name == "prepare"
    assert {"bare_loop", "one_process", "two_processes"} == set(measured["seconds"])
    assert measured["peak_memory_mib_after_all"] >= measured["peak_memory_mib_after_a_tenth"] > 0
    assert measured["near_duplicates_bytes_a_sample"] > 0


@pytest.mark.full
def test_true_size(benchmark, tmp_path):
    name, measured = run(benchmark("true_size"), tmp_path, "--threads", "1")
    assert name == "true_size"
    assert set(measured) == {"tiny prime", "tiny slim"}
    for found in measured.values():
        assert found["scale_0_is_the_base"]
        assert found["control_changes_the_output"]
        assert found["peak_memory_gib"] > 0.1


@pytest.mark.full
def test_evaluation_share(benchmark, tmp_path, monkeypatch):
    use_weights(monkeypatch, write_tiny(tmp_path / "weights"))
    module = benchmark("evaluation_share")
    name, measured = run(module, tmp_path / "out")
    assert name == "evaluation_share"
    assert set(measured["seconds"]) == {"bare_loop", "evaluator"}
    (bare,), (own,) = measured["seconds"]["bare_loop"], measured["seconds"]["evaluator"]
    assert bare > 0
    assert own > 0
    assert measured["share_over_drawing_median"] == pytest.approx(own / bare - 1, abs=0.02)
    assert (BENCHMARKS / "results" / "evaluation_share.json").is_file()


@pytest.mark.full
def test_sd15_step_times_every_method(benchmark, tmp_path):
    name, measured = run(benchmark("sd15_step"), tmp_path)
    assert name == "sd15_step"
    assert set(measured["step_s"]) == {"t2i", "slim", "prime", "controlnet-xs", "controlnet"}
    assert all(found["median"] > 0 for found in measured["step_s"].values())
    assert measured["predict_s"]["median"] > 0
    assert measured["decode_s"]["median"] > 0


def test_sd15_cost_reports_a_gpus_hours(benchmark):
    seconds = {"step_s": {"prime": {"median": 0.8}}, "predict_s": {"median": 1.9}, "decode_s": {"median": 2}}
    gpu = {"settings": {"batch_size": 8}, "measured": seconds}
    # 200,000 steps of 0.8 s, and 5,000 pictures, eight of which take 20 x 1.9 + 2 s, half as much again.
    hours = benchmark("sd15_cost").gpu_hours("prime", gpu, 1.5)
    assert hours == pytest.approx((200_000 * 0.8 + 5_000 / 8 * 40 * 1.5) / 3600)


@pytest.mark.full
def test_sd15_cost_counts_at_true_size(benchmark, tmp_path):
    name, measured = run(benchmark("sd15_cost"), tmp_path)
    assert name == "sd15_cost"
    (method,) = measured["methods"]
    found = measured["methods"][method]
    assert found["parameters"] == 77_369_280  # T2I-Adapter's at SD 1.5
    call = measured["unet_call_gmacs"]
    # Forward through the base and back through what follows the first feature: less than three calls.
    assert 2 * call < found["gmacs_per_trained_sample"] < 3 * call
    assert found["gmacs_per_picture"] > 2 * 20 * call
    assert found["gmacs_per_cell"] == round(
        1_600_000 * found["gmacs_per_trained_sample"] + 5_000 * found["gmacs_per_picture"]
    )


@pytest.mark.full
def test_map_sizes(benchmark, tmp_path, monkeypatch):
    use_weights(monkeypatch, write_tiny(tmp_path / "weights"))
    name, measured = run(benchmark("map_sizes"), tmp_path / "out")
    assert name == "map_sizes"
    assert list(measured["rows"]) == ["128", "256", "256 as image"]
    assert measured["rows"]["128"]["less_that_of_128"]["value"] == 0


@pytest.mark.full
def test_fading(benchmark, tmp_path, monkeypatch):
    use_weights(monkeypatch, write_tiny(tmp_path / "weights"))
    name, measured = run(benchmark("fading"), tmp_path / "out")
    assert name == "fading"
    assert set(measured["loss"]) == set(measured["best_factor"]) == STORED["canny"]
    alone = {rows["50"]["0"] for rows in measured["loss"].values()}
    assert len(alone) == 1  # times 0 every adapter is the base
    for method, rows in measured["loss"].items():
        for timestep, row in rows.items():
            assert row[f"{measured['best_factor'][method][timestep]:g}"] == min(row.values())
    assert 0 < measured["noise_share"]["50"] < measured["noise_share"]["150"] < 1


def test_larger_maps_control_as_well_by_the_committed_results():
    rows = json.loads((BENCHMARKS / "results" / "map_sizes.json").read_text())["measured"]["rows"]
    for size in ("256", "512", "1024"):
        assert abs(rows[size]["less_that_of_128"]["value"]) <= 0.03
        assert rows[f"{size} as image"]["less_that_of_128"]["value"] < -0.03  # what averaging lost


def test_lines_of_a_larger_map_lie_where_those_of_a_small_one_do(benchmark):
    map_sizes = benchmark("map_sizes")
    scenes = load_test_scenes(4, first_seed=map_sizes.FIRST_SEED)
    for scene in scenes:
        small = np.asarray(canny(map_sizes.render_at(scene.scene, SIZE)))
        for factor in (2, 4):
            large = canny(map_sizes.render_at(scene.scene, factor * SIZE))
            shrunk = resize_map(large, (SIZE, SIZE), "lines")
            assert edge_f1(np.asarray(shrunk)[..., 0] > 127, small[..., 0] > 127) > 0.97
