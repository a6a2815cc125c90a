import dataclasses
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny
from tests.conditions import tiny_models
from tests.refusals import refused
from tests.training.runs import write_images
from tests.weights import use_weights, write_tiny

from nexus_adapters import load_adapter, load_base
from nexus_adapters.bases.base import parts_sha256
from nexus_adapters.bases.families import base_of
from nexus_adapters.choices import DATA_KINDS
from nexus_adapters.conditions import extract
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.embedded.held_out import load_test_scenes, score_images
from nexus_adapters.evaluation.cases import Case
from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.evaluation.generation import generate, generate_batch
from nexus_adapters.evaluation.provenance import model_sha256
from nexus_adapters.evaluation.report import DATA_NAMES, PAGE, RESULTS, SCORES, TABLE, write_report
from nexus_adapters.evaluation.run import evaluate
from nexus_adapters.evaluation.scoring import scoring_sha256
from nexus_adapters.evaluation.store import Store, claim
from nexus_adapters.methods import GenerationSettings, find_method
from nexus_adapters.metrics import METRICS, Metric, register_metric
from nexus_adapters.training.config import BaseOptions, DataOptions
from nexus_adapters.training.data_identity import UNKNOWN, TrainedOn

ROOT = Path(__file__).parents[2]
ADAPTERS = {"prime": "prime", "t2i": "t2i"}
COUNT = 3
SCENES = DataOptions(kind="scenes", split="test", count=COUNT, resolution=128)
FAST = {"num_inference_steps": 2, "guidance_scale": 2.0, "batch_size": 2}


def built_for(pipe, name):
    """The untrained adapter of a method, with as many channels as the base where that is an option."""
    method, (base, unet) = find_method(name), base_of(pipe)
    options = {"size_ratio": 1.0} if name == "controlnet-xs" else {}
    return method.build(base, unet, method.Options(name, **options))


def config(data=SCENES, **changes):
    return EvaluationConfig(data=data, **FAST | changes)


@pytest.fixture(scope="module", autouse=True)
def weights(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = write_tiny(tmp_path_factory.mktemp("weights"))
        use_weights(patch, folder)
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    found = evaluate(config(), ADAPTERS, out, show_progress=False)
    write_report(found)
    return found


def pixels(folder):
    return {
        str(file.relative_to(folder)): np.asarray(Image.open(file)).tobytes()
        for file in sorted(folder.rglob("*.png"))
    }


def written(folder):
    """When each image and score was written: those that are made again have another time."""
    files = [*folder.rglob("*.png"), *folder.rglob("*.npz")]
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in files}


def without_times(text):
    content = json.loads(text)
    for method in content["methods"].values():
        del method["draw_s"], method["score_s"]
    return content


def test_images_and_scores_are_those_of_generate_and_score_images(finished):
    scenes = load_test_scenes(COUNT)
    base = tiny.quiet(load_base())
    for name, adapter in {"base": None, **{n: load_adapter(n) for n in ADAPTERS}}.items():
        expected = generate(base, adapter, scenes, config().sampling)
        for place, image in enumerate(expected):
            found = np.asarray(Image.open(finished.folder / name / "images" / f"{place:05d}.png"))
            assert np.array_equal(found, image)
        for metric, values in score_images(expected, scenes).items():
            assert np.array_equal(finished.methods[name].measured.scores[metric], values)
    assert list(finished.methods) == ["reference", "base", "prime", "t2i"]
    assert finished.methods["prime"].parameters > 0 == finished.methods["base"].parameters


def test_the_datas_own_images_are_scored_alike(finished):
    for metric, values in finished.methods["reference"].measured.scores.items():
        assert values == pytest.approx(1), metric


def test_the_report_has_a_name_for_each_kind_of_data():
    assert set(DATA_NAMES) == set(DATA_KINDS)


def test_the_report_has_settings_scores_and_images(finished):
    content = json.loads((finished.folder / RESULTS).read_text())
    assert content["settings"]["num_inference_steps"] == 2
    assert content["settings"]["data_sha256"]
    assert set(content["versions"]) >= {"torch", "diffusers"}
    assert content["machine"]["cores"]
    assert content["asked_for"]["clip"] == content["asked_for"]["features"] == ""
    assert content["asked_for"]["data"]["kind"] == "scenes"
    found = content["methods"]["prime"]["metrics"]["edge_f1"]
    assert found["low"] is found["high"] is None  # of so few samples
    assert 0 <= found["value"] <= 1
    assert found["n"] == COUNT
    lines = (finished.folder / SCORES).read_text().splitlines()
    assert lines[0].startswith("method,place,binding_color")
    assert len(lines) == 1 + 4 * COUNT
    table = (finished.folder / TABLE).read_text()
    assert "| prime | 0.0" in table
    assert f"{COUNT} samples of the embedded scenes with maps of canny and their own prompts" in table
    page = (finished.folder / PAGE).read_text()
    assert page.count("<img") == COUNT * (2 + 3)
    assert "scene 2" in page


def test_what_was_stopped_resumes_to_the_same_images_and_results(finished, tmp_path):
    scored, out = [], tmp_path / "out"

    def interrupting(generated):
        scored.append(generated)
        if len(scored) == 9:  # of the second batch
            raise KeyboardInterrupt
        return 1.0

    with METRICS.temporary():
        register_metric(Metric("interrupting", function=interrupting))
        with pytest.raises(KeyboardInterrupt):
            evaluate(config(), ADAPTERS, out, show_progress=False)
    before = {name: time for name, time in written(out).items() if name.endswith(".png")}
    assert 0 < len(before) < len(pixels(finished.folder))
    found = evaluate(config(), ADAPTERS, out, show_progress=False)
    write_report(found)
    assert before.items() <= written(out).items()
    assert pixels(out) == pixels(finished.folder)
    texts = [(folder / RESULTS).read_text() for folder in (out, finished.folder)]
    assert without_times(texts[0]) == without_times(texts[1])
    whole = written(out)
    evaluate(config(), ADAPTERS, out, show_progress=False)
    assert written(out) == whole


def test_what_is_damaged_is_made_again_and_nothing_else(finished, tmp_path):
    """With a warning of each, and to the same images and results."""
    out = shutil.copytree(finished.folder, tmp_path / "out")
    scores = {name: sorted((out / name).glob("scores-*/*.npz")) for name in ("reference", *finished.methods)}
    marks = {name: sorted((out / name / "drawn").glob("*.json")) for name in ("base", "prime", "t2i")}
    scores["reference"][0].write_bytes(b"")
    scores["base"][0].write_bytes(scores["base"][0].read_bytes()[:-30])
    with np.load(scores["prime"][1]) as arrays:
        np.savez(scores["prime"][1], **{name: arrays[name][:0] for name in arrays.files if arrays[name].ndim})
    np.savez(scores["t2i"][1], scores=np.array([{"an": "object"}]))
    marks["base"][1].write_text('{"draw_s"')
    marks["prime"][0].write_text('["draw_s"]')
    cut = out / "t2i" / "images" / "00000.png"
    cut.write_bytes(cut.read_bytes()[:-20])
    (out / "base" / "images" / "00002.png").unlink()
    whole = {name: time for name, time in written(finished.folder).items() if "prime/images/00002" in name}
    with pytest.warns(UserWarning, match="will be made again"):
        found = evaluate(config(), ADAPTERS, out, show_progress=False)
    write_report(found)
    assert pixels(out) == pixels(finished.folder)
    assert len(whole) == 1
    assert whole.items() <= written(out).items()
    texts = [(folder / RESULTS).read_text() for folder in (out, finished.folder)]
    assert without_times(texts[0]) == without_times(texts[1])


def test_another_adapter_joins_and_other_metrics_generate_nothing_again(finished, tmp_path):
    out = tmp_path / "out"
    evaluate(config(), {"t2i": "t2i"}, out, show_progress=False)
    first = written(out)
    evaluate(config(), ADAPTERS, out, show_progress=False)
    assert first.items() <= written(out).items()
    assert pixels(out) == pixels(finished.folder)
    second = written(out)
    found = evaluate(config(judge={"low": 50.0}), ADAPTERS, out, show_progress=False)
    assert set(found.methods) == {"reference", "base", "prime", "t2i"}
    added = written(out).keys() - second.keys()
    assert second.items() <= written(out).items()
    assert added
    assert all(name.endswith(".npz") for name in added)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    """Damage that only decoding finds."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


PICTURES = {
    "gone": Path.unlink,
    "cut": cut,
    "empty": lambda file: file.write_bytes(b""),
    "another kind": lambda file: Image.new("RGB", (8, 8)).save(file, "JPEG"),
}
MARKS = {"damaged": "{", "another's": "[]", "empty": "", "without a time": "{}", "null": '{"draw_s": null}'}
SCORES_OF = {
    "cut": cut,
    "empty": lambda file: file.write_bytes(b""),
    "no archive": lambda file: file.write_bytes(b"PK"),
    "of other images": lambda file: np.savez(file, a=np.zeros(5), score_s=1),
    "without a time": lambda file: np.savez(file, a=np.zeros(2)),
    "no rows": lambda file: np.savez(file, a=1, score_s=1),
}


def stored(folder):
    store, places = Store(folder, "abc"), range(2)
    store.keep_images(places, [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")], 1.5)
    store.keep_scores(places, {"a": np.zeros(2), "score_s": np.array(0.5)})
    return store


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_damaged_counts_as_not_made(tmp_path):
    places = range(2)
    for name, damage in PICTURES.items():
        store = stored(tmp_path / name)
        assert store.has_images(places)
        damage(store.folder / "images" / "00001.png")
        assert not store.has_images(places), name
        assert store.images(places) is None, name
    store = stored(tmp_path / "flipped")
    flip(store.folder / "images" / "00001.png")
    assert store.images(places) is None
    assert not store.has_images(places)  # from then on
    for text in MARKS.values():
        store = stored(tmp_path / "mark")
        (store.folder / "drawn" / "00000-00002.json").write_text(text)
        assert store.images(places) is store.generation_s(places) is None
    for name, damage in SCORES_OF.items():
        store = stored(tmp_path / "scores")
        assert store.scores(places)["a"].tolist() == [0, 0]
        damage(next(store.folder.rglob("*.npz")))
        assert store.scores(places) is None, name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_evaluation_is_completed_again(finished, tmp_path):
    out = shutil.copytree(finished.folder, tmp_path / "out")
    (out / "prime" / "images" / "00001.png").unlink()
    (out / "base" / "drawn" / "00000-00002.json").write_text("{")
    flip(out / "t2i" / "images" / "00000.png")
    for file in (out / "reference").rglob("*.npz"):
        cut(file)
    for _ in range(2):  # what only decoding finds is made again by the next run
        found = evaluate(config(), ADAPTERS, out, show_progress=False)
        write_report(found)
    assert pixels(out) == pixels(finished.folder)
    assert "(damaged)" not in (out / PAGE).read_text()
    for name, method in finished.methods.items():
        for metric, values in method.measured.scores.items():
            assert np.array_equal(found.methods[name].measured.scores[metric], values)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"drawing": [], "adapters": {}}', '{"drawing": {}, "adapters": 3}', "[" * 9999],
)
def test_damaged_settings_are_refused(text, tmp_path):
    (tmp_path / "settings.json").write_text(text)
    with refused("out", "settings.json"):
        claim(tmp_path, {}, {}, {})
    assert (tmp_path / "settings.json").read_text() == text


def test_a_folder_of_other_settings_is_refused_before_anything_is_generated(finished, tmp_path):
    with refused("out", f"'{finished.folder}'", expected="num_inference_steps=3"):
        evaluate(config(num_inference_steps=3), ADAPTERS, finished.folder, show_progress=False)
    with refused("out", f"'{finished.folder}'", expected="prime='"):
        evaluate(config(), {"prime": "slim"}, finished.folder, show_progress=False)
    settings = finished.folder / "settings.json"
    content = json.loads(settings.read_text())
    del content["drawing"]["scale"]  # as an earlier version would have written it, which had no such field
    settings.write_text(json.dumps(content))
    with refused("out", "with 1.0", expected="scale=0.5"):
        evaluate(config(scale=0.5), ADAPTERS, finished.folder, show_progress=False)
    evaluate(config(), ADAPTERS, finished.folder, show_progress=False)
    (tmp_path / "file").touch()
    with refused("out", f"'{tmp_path / 'file'}', which is a file"):
        evaluate(config(), ADAPTERS, tmp_path / "file", show_progress=False)
    (tmp_path / "file").unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "settings.json").write_text('{"editor": 1}')
    with refused("out", f"'{tmp_path / 'mine'}', whose settings.json"):
        evaluate(config(), ADAPTERS, tmp_path / "mine", show_progress=False)
    (tmp_path / "note.txt").touch()
    with refused("out", "contains mine", expected="a new or empty folder"):
        evaluate(config(), ADAPTERS, tmp_path, show_progress=False)


@pytest.mark.parametrize(
    ("changes", "name", "received", "expected"),
    [
        ({"adapters": {"base": "prime"}}, "adapter", "'base'", "other than base, reference"),
        ({"adapters": {"a b": "prime"}}, "adapter", "'a b'", "a name of letters"),
        ({"adapters": {"results.json": "prime"}}, "adapter", "'results.json'", "other than base"),
        ({"adapters": {"Reference": "prime"}}, "adapter", "'Reference'", "other than base"),
        ({"adapters": {"prime": "prime", "Prime": "slim"}}, "adapter", "'Prime'", "more than case"),
        ({"adapters": {"x": "none"}}, "adapter", "'none'", "a saved adapter"),
        ({"adapters": {"x": "no/where"}}, "adapter", "'no/where'", "a saved adapter"),
        ({"features": "no/where"}, "features", "3", "at least 40 samples"),
        ({"clip": "no/where"}, "clip", "'no/where'", "a folder or the Hub id of a vision model"),
        ({"judge": {"lower": 1.0}}, "judge", "'lower'", "canny"),
        ({"base": BaseOptions(path="no/where")}, "base", "'no/where'", ""),
    ],
)
def test_wrong_input_is_one_error_before_anything_is_generated(tmp_path, changes, name, received, expected):
    changes = dict(changes)
    adapters = changes.pop("adapters", ADAPTERS)
    with refused(name, received, expected=expected):
        evaluate(config(**changes), adapters, tmp_path / "out", show_progress=False)
    assert not (tmp_path / "out" / "base").exists()


def test_a_method_whose_images_are_not_finite_is_named(tmp_path):
    adapter = load_adapter("t2i")
    with torch.no_grad():
        next(adapter.parameters()).fill_(1e38)  # finite, as weights that are saved must be
    adapter.save_pretrained(tmp_path / "diverged")
    once = config(replace(SCENES, count=1), num_inference_steps=1)
    with refused("method mine", "1 of 1", expected="finite pixels"):
        evaluate(once, {"mine": str(tmp_path / "diverged")}, tmp_path / "out", show_progress=False)


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with refused("adapter", "'none'", hint="prime, slim, prime-paper, slim-paper, t2i"):
        evaluate(config(), {"x": "none"}, tmp_path / "out", show_progress=False)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    unet = tiny.unet(sample_size=16, block_out_channels=(8, 16, 16, 16))
    tiny.adapter(unet).save_pretrained(tmp_path / "nexus")
    built_for(tiny.sd15(unet=unet), "controlnet").save_pretrained(tmp_path / "controlnet")
    for name in ("nexus", "controlnet"):
        with refused("adapter", "8, 16, 16, 16") as caught:
            evaluate(config(), {name: str(tmp_path / name)}, tmp_path / "out", show_progress=False)
        assert "8, 16, 24, 24" in caught.value.expected


class TestFolder:
    """A user's own images."""

    @pytest.fixture
    def photos(self, tmp_path):
        return write_images(tmp_path / "photos", 4)

    def of(self, photos, weights, **changes):
        data = DataOptions(kind="folder", path=str(photos), resolution=64)
        return config(data, base=BaseOptions(path=str(weights / "base")), **changes)

    def test_is_scored_by_its_structure(self, photos, weights, tmp_path, recwarn):
        adapters = {"prime": str(weights / "canny" / "prime")}
        found = evaluate(self.of(photos, weights), adapters, tmp_path / "out", show_progress=False)
        assert not [each for each in recwarn if each.category is UserWarning]
        assert set(found.methods["prime"].measured.scores) == {"edge_f1", "ms_ssim"}
        assert [found.cases[place].prompt for place in range(2)] == ["a red star", "a blue ring"]
        assert found.cases[0].condition.size == (64, 64)

    def test_contradicting_prompts_are_other_samples(self, photos, weights, tmp_path):
        adapters = {"prime": str(weights / "canny" / "prime")}
        chosen = self.of(photos, weights, prompts="contradicting")
        found = evaluate(chosen, adapters, tmp_path / "out", show_progress=False)
        prompts = [found.cases[place].prompt for place in range(4)]
        assert prompts == ["a blue ring", "a green cat", "photo of a dog", "a red star"]
        assert [found.cases[place].words for place in range(4)] == prompts[-1:] + prompts[:-1]

    @pytest.fixture
    def trained(self, photos, weights, tmp_path):
        """An adapter whose run was trained on two of the photos."""
        adapter = shutil.copytree(weights / "canny" / "prime", tmp_path / "run" / "adapter")
        source = FolderSource(photos)
        record = TrainedOn(frozenset(source.image_hash(index)[:16] for index in (1, 3)))
        (adapter / "training.json").write_text(json.dumps(record.as_json()))
        return adapter

    def test_samples_that_an_adapter_was_trained_on_are_counted(self, photos, weights, trained, tmp_path):
        adapters = {"mine": str(trained), "other": str(weights / "canny" / "prime")}
        with pytest.warns(UserWarning, match="mine was trained on 2 of the 4 samples") as caught:
            evaluate(self.of(photos, weights), adapters, tmp_path / "out", show_progress=False)
        assert not [each for each in caught if str(each.message).startswith("other")]

    def test_a_run_that_must_not_know_the_samples_is_held_to_it(self, photos, weights, trained, tmp_path):
        chosen, out = self.of(photos, weights), tmp_path / "out"
        for run in (trained.parent, trained):
            with refused("held_out_of", "2 of 4", hint="--first"):
                evaluate(chosen, {}, out, show_progress=False, held_out_of=str(run))
        (tmp_path / "other").mkdir()
        old = shutil.copytree(trained, tmp_path / "old")
        (old / "training.json").write_text('{"steps": 2, "stopped_early": false}')
        for place, why in (("no/where", "not exist"), ("other", "not a run"), ("old", "earlier version")):
            with refused("held_out_of", why, expected="records"):
                evaluate(chosen, {}, out, show_progress=False, held_out_of=str(tmp_path / place))
        assert not out.exists()
        third = self.of(photos, weights, first=2)
        third = dataclasses.replace(third, data=dataclasses.replace(third.data, count=1))
        assert evaluate(third, {}, out, show_progress=False, held_out_of=str(trained.parent))

    def test_a_record_that_does_not_have_all_is_no_proof(self, photos, weights, trained, tmp_path):
        chosen, out = self.of(photos, weights, first=2), tmp_path / "out"
        chosen = dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, count=1))
        for reason in ("", "its data are at URLs"):
            record = dataclasses.replace(UNKNOWN, reason=reason)
            (trained / "training.json").write_text(json.dumps(record.as_json()))
            with refused("held_out_of", f"({reason})" if reason else "record", expected="all samples"):
                evaluate(chosen, {}, out, show_progress=False, held_out_of=str(trained.parent))
        with pytest.warns(UserWarning, match="mine may have been trained on .* at URLs"):
            evaluate(chosen, {"mine": str(trained)}, out, show_progress=False)

    def test_maps_that_do_not_fit_the_images_are_reported(self, photos, weights, tmp_path):
        lines = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
        for place, line in enumerate(lines):
            line["map"] = f"map-{place}.png"
            found = extract("canny", Image.open(photos / line["file_name"]))
            found.point(lambda value: value // 3).save(photos / line["map"])  # faded
        (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        chosen = self.of(photos, weights)
        chosen = dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, condition_column="map"))
        with pytest.warns(UserWarning, match=r"only edge F1 0\.\d\d"):
            evaluate(chosen, {}, tmp_path / "out", show_progress=False)

    def test_without_captions_is_refused(self, photos, weights, tmp_path):
        text = (photos / "metadata.jsonl").read_text().replace("a blue ring", " ")
        (photos / "metadata.jsonl").write_text(text)
        with refused("data", "01.png'", expected="a caption"):
            evaluate(self.of(photos, weights), {}, tmp_path / "out", show_progress=False)

    def test_an_unreadable_sample_is_refused(self, photos, weights, tmp_path):
        (photos / "02.png").write_bytes(b"no picture")
        with refused("data", "02.png", expected="readable samples"):
            evaluate(self.of(photos, weights), {}, tmp_path / "out", show_progress=False)

    def test_too_few_samples_are_refused(self, photos, weights, tmp_path):
        with refused("first", "4", expected="number of samples, 4"):
            evaluate(self.of(photos, weights, first=4), {}, tmp_path / "out", show_progress=False)


SCRIPT = """
import sys
from pathlib import Path
from pytest import MonkeyPatch
from tests.weights import use_weights
from nexus_adapters.cli import main
use_weights(MonkeyPatch(), Path(sys.argv.pop(1)))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.full
def test_two_processes_generate_the_same_as_one(finished, weights, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [
        "--adapter",
        "prime",
        "--adapter",
        "t2i",
        "--count",
        str(COUNT),
        "--steps",
        "2",
        "--batch-size",
        "2",
    ]
    subprocess.run(
        [
            *command,
            str(tmp_path / "script.py"),
            str(weights),
            "evaluate",
            *arguments,
            "--out",
            tmp_path / "out",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        timeout=600,
    )
    one, two = pixels(finished.folder), pixels(tmp_path / "out")
    assert one.keys() == two.keys()
    for name, content in one.items():
        difference = np.frombuffer(content, np.uint8).astype(int) - np.frombuffer(two[name], np.uint8)
        assert np.abs(difference).max() <= 1  # another number of threads may round otherwise
    texts = [json.loads((folder / RESULTS).read_text()) for folder in (finished.folder, tmp_path / "out")]
    for name, method in texts[0]["methods"].items():
        for metric, estimate in method["metrics"].items():
            other = texts[1]["methods"][name]["metrics"][metric]
            assert other["value"] == pytest.approx(estimate["value"], abs=0.01)


def test_another_sampler_in_the_base_is_another_base(weights, tmp_path):
    photos = write_images(tmp_path / "photos", 2)
    shutil.copytree(weights / "base", tmp_path / "base")
    data = DataOptions(kind="folder", path=str(photos), resolution=64)
    chosen = config(data, base=BaseOptions(path=str(tmp_path / "base")))
    evaluate(chosen, {}, tmp_path / "out", show_progress=False)
    file = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.02}))
    with refused("out", f"'{tmp_path / 'out'}'", expected="weights or configs of the base"):
        evaluate(chosen, {}, tmp_path / "out", show_progress=False)


def test_an_adapters_config_counts(weights):
    one, other = (tiny.adapter(tiny.unet(), variant=variant) for variant in ("prime", "prime-paper"))
    assert parts_sha256({"adapter": one}) == parts_sha256({"adapter": other})
    assert model_sha256({"adapter": one}) != model_sha256({"adapter": other})


def test_other_versions_and_other_judges_score_anew(weights, tmp_path, monkeypatch):
    clip = tiny_models.clip(tmp_path / "clip")
    chosen = config(clip=clip)
    before = scoring_sha256(chosen)
    assert scoring_sha256(chosen) == before
    (tmp_path / "clip" / "note").write_text("retrained")
    changed = scoring_sha256(chosen)
    assert changed != before
    (tmp_path / "torch-9.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 9\n"
    (tmp_path / "torch-9.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    assert scoring_sha256(chosen) != changed


def test_sdxl_adapters_may_read_the_empty_prompt(tmp_path):
    pipe = tiny.sdxl()
    adapter = tiny.adapter(pipe.unet)
    cases = [Case("a", "a red star", "a red star", tiny.image(128, 128), tiny.image(), None)]
    settings = [GenerationSettings(adapter_prompts=prompts) for prompts in (None, [""])]
    own, nothing = (generate_batch(pipe, adapter, cases, 0, config().sampling, each) for each in settings)
    assert not np.array_equal(own, nothing)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
def test_sdxl_is_evaluated_with_every_kind_of_adapter(tmp_path, dtype):
    pipe = tiny.sdxl()
    pipe.save_pretrained(tmp_path / "base")
    photos = write_images(tmp_path / "photos", 2)
    adapters = {}
    for method in ("prime", "t2i", "controlnet", "controlnet-xs"):
        adapters[method] = str(tmp_path / method)
        built_for(pipe, method).save_pretrained(adapters[method])
    data = DataOptions(kind="folder", path=str(photos), resolution=128)
    chosen = config(data, base=BaseOptions(path=str(tmp_path / "base")), dtype=dtype)
    found = evaluate(chosen, adapters, tmp_path / "out", show_progress=False)
    generated = pixels(tmp_path / "out")
    plain = generated["base/images/00000.png"]
    for name in ("prime", "t2i"):
        assert generated[f"{name}/images/00000.png"] != plain
    if dtype == "float32":  # untrained, both add exactly nothing
        for name in ("controlnet", "controlnet-xs"):
            difference = np.frombuffer(generated[f"{name}/images/00000.png"], np.uint8).astype(int)
            assert np.abs(difference - np.frombuffer(plain, np.uint8)).max() <= 1
    for name in adapters:
        assert np.isfinite(found.methods[name].measured.scores["edge_f1"]).all()
    assert found.settings["dtype"] == dtype
