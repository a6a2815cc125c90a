"""An evaluation from end to end: every method generates an image for every case, and all are scored."""

from __future__ import annotations

import dataclasses
import json
import re
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from nexus_adapters.adapter.saved import RUN_ADAPTER, RUN_CONFIG, RUN_RECORD, Saved, find_saved
from nexus_adapters.bases.base import Base
from nexus_adapters.bases.loading import load_base, open_base
from nexus_adapters.bases.tokens import find_tokenizer
from nexus_adapters.errors import InvalidArgument, expect, renamed
from nexus_adapters.evaluation.cases import Case, Cases, content_sha256, open_cases
from nexus_adapters.evaluation.config import LEAST_FOR_DISTANCES, EvaluationConfig
from nexus_adapters.evaluation.estimates import REFERENCE, Evaluation, Measured, batches, collect
from nexus_adapters.evaluation.generation import generate_batch
from nexus_adapters.evaluation.provenance import choose_dtype, model_sha256, versions
from nexus_adapters.evaluation.report import PAGE, RESULTS, SCORES, TABLE
from nexus_adapters.evaluation.scoring import Scorer, scoring_sha256
from nexus_adapters.evaluation.store import SETTINGS, Store, claim
from nexus_adapters.files import cache_folder, locked
from nexus_adapters.methods import GenerationSettings, load_saved, method_for, method_of
from nexus_adapters.methods.method import unread_settings
from nexus_adapters.metrics import find_metric
from nexus_adapters.progress import progress
from nexus_adapters.training.data_identity import TrainedOn, read_trained
from nexus_adapters.training.distributed import leave_together

BASE_ALONE = "base"  # the method without an adapter
NAME = re.compile(r"[A-Za-z0-9][\w.+@-]*")
LEAST_OF_REFERENCE = 0.9  # of metrics whose best value is 1: less is a fault of the maps or the judge
_NOT_ALL = "does not record all samples that it, or the adapter it started from, was trained on"
SCORING_FIELDS = ("features", "clip", "judge")  # they change no image


def evaluate(
    config: EvaluationConfig,
    adapters: Mapping[str, str],
    out: Path,
    show_progress: bool = True,
    with_base: bool = True,
    reference: Path | None = None,
    held_out_of: str = "",
) -> Evaluation | None:
    """Generate and score the images that are missing, by the base alone and by each adapter.

    Under `accelerate launch` the processes share the batches; each batch is generated whole by one of them,
    so their number changes no image.

    Args:
        config: of the evaluation.
        adapters: name -> whatever `load_adapter` takes.
        out: a new folder, or one of an evaluation of the same settings, which is resumed.
        show_progress: on the main process.
        with_base: whether the base without an adapter is evaluated too.
        reference: folder for the scores of the originals, which evaluations of the same data share; None to
            keep them in `out`.
        held_out_of: the folder of a run that must not have been trained on any of the samples; "" for none.

    Returns:
        The results; None on all processes but the main one.

    Raises:
        InvalidArgument: for data without captions or that cannot be read, too few of them for a distance, an
            adapter that does not fit, a model that does not exist, samples that `held_out_of` was trained
            on, or a folder of other settings: all before the first image; and for a method whose images are
            not finite.

    Warns:
        UserWarning: for samples that an adapter was trained on, as far as its run records them, and if the
            data's own images do not score as they should.
    """
    check_names(adapters, "adapter")
    if out.exists() and not out.is_dir():
        raise InvalidArgument("out", "a folder", f"'{out}', which is a file")
    base_configs, cases = open_evaluation(config)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    device, is_main = accelerator.device, accelerator.is_main_process
    dtype = choose_dtype(config.dtype, device)
    loaded: dict[str, Any] = {BASE_ALONE: None} if with_base else {}
    saved: dict[str, Saved] = {}
    for name, adapter in adapters.items():
        saved[name] = find_saved(adapter, config.data.condition, config.base.path)
        method_for(saved[name]).check_saved(saved[name], base_configs)
        loaded[name] = load_saved(saved[name])
        method = method_of(loaded[name])
        method.check_fit(loaded[name], base_configs)
        for setting in unread_settings(method, settings_of(config)):
            warnings.warn(f"{setting} has no effect on {name}, a {method.label}", stacklevel=2)
    if is_main:
        _check_held_out(cases, held_out_of, saved)
    hashes = {name: model_sha256({"adapter": each}) for name, each in loaded.items() if each is not None}
    scorer = Scorer(config, str(device))
    tokenizer = find_tokenizer(config.base.source) if is_main else None
    data_sha256 = content_sha256(cases, show_progress and is_main, tokenizer)
    base = load_base(config.base.source, dtype=dtype, safety_checker=None)
    base.set_progress_bar_config(disable=True)
    if device.type != "cpu":  # where it is; diffusers would warn that float16 cannot run there, but it does
        base.to(device)
    base_sha256 = model_sha256(base.components, base.config)
    settings = _settings(config, data_sha256, base_sha256, dtype)
    with locked(out, "out") if is_main else nullcontext():
        if is_main:
            claim(out, settings, hashes, dataclasses.asdict(EvaluationConfig()))
        accelerator.wait_for_everyone()
        for adapter in loaded.values():
            if adapter is not None:
                nn.Module.to(adapter, device, dtype)
        stores = _stores(config, out, loaded)
        if reference is not None:
            stores[REFERENCE] = Store(reference / data_sha256[:16], scoring_sha256(config))
        _work(config, cases, loaded, stores, base, scorer, accelerator, show_progress)
        accelerator.wait_for_everyone()
        found = None
        if is_main:
            weights = {name: each.sha256() for name, each in saved.items()}
            methods = collect(cases, config.batch_size, stores, {**adapters, BASE_ALONE: ""}, weights, loaded)
            found = Evaluation(config, settings, methods, cases, out)
            _check_reference(methods[REFERENCE].measured)
        leave_together(accelerator)
    return found


def open_evaluation(config: EvaluationConfig) -> tuple[Base, Cases]:
    """The base's configs, and the cases, not yet read. `InvalidArgument` if they are missing or too few."""
    base = open_base(config.base.source)
    cases = open_cases(config, cache_folder() / "training", base.size_multiple)
    if config.features and len(cases) < LEAST_FOR_DISTANCES:
        raise InvalidArgument(
            "features",
            f"at least {LEAST_FOR_DISTANCES} samples, for distances between sets",
            f"{len(cases)} for '{config.features}'",
        )
    return base, cases


def check_names(names: Iterable[str], argument: str) -> None:
    """`InvalidArgument` for names that cannot be folders next to each other and to the files of results.

    Some file systems do not distinguish case.
    """
    own = (BASE_ALONE, REFERENCE, SETTINGS, RESULTS, TABLE, PAGE, SCORES)
    seen: set[str] = set()
    for name in names:
        for fits, expected in (
            (NAME.fullmatch(name), "a name of letters, digits and . + @ - _"),
            (name.casefold() not in own, f"a name other than {', '.join(own)}"),
            (name.casefold() not in seen, "names that differ in more than case"),
        ):
            expect(bool(fits), argument, expected, repr(name))
        seen.add(name.casefold())


def _check_held_out(cases: Cases, held_out_of: str, adapters: Mapping[str, Saved]) -> None:
    """`InvalidArgument` for samples that `held_out_of` was trained on; warn of those of the adapters."""
    if held_out_of:
        record = read_trained(Path(held_out_of))
        if record is None:
            expected = "the folder of a run that records which samples it was trained on"
            raise InvalidArgument("held_out_of", expected, f"'{held_out_of}', {_why_none(held_out_of)}")
        if count := cases.count_trained(record):
            raise InvalidArgument(
                "held_out_of",
                "a run that was trained on none of the samples",
                f"'{held_out_of}', which was trained on {count} of {len(cases)}",
                "Evaluate other data, or other samples by --first and --count",
            )
        if not record.is_complete and cases.may_be_trained:
            raise InvalidArgument(
                "held_out_of",
                "a run that records all samples it was trained on",
                f"'{held_out_of}', which {_NOT_ALL}{_because(record)}",
            )
    for name, each in adapters.items():
        record = read_trained(each.path)
        if record is None:
            continue
        if count := cases.count_trained(record):
            warnings.warn(
                f"{name} was trained on {count} of the {len(cases)} samples, so its scores do not show what "
                "it does with new ones",
                stacklevel=3,
            )
        elif not record.is_complete and cases.may_be_trained:
            warnings.warn(
                f"{name} may have been trained on some of the samples: it {_NOT_ALL}{_because(record)}",
                stacklevel=3,
            )


def _because(record: TrainedOn) -> str:
    return f" ({record.reason})" if record.reason else ""


def _why_none(run: str) -> str:
    """Why a folder has no record of the samples, as what follows its name."""
    if not Path(run).exists():
        return "which does not exist"
    if any((Path(run) / name).is_file() for name in (RUN_CONFIG, RUN_RECORD, f"{RUN_ADAPTER}/{RUN_RECORD}")):
        return "whose record is damaged, or which is of an earlier version that kept none"
    return "which is no run"


def _check_reference(reference: Measured) -> None:
    """Warn where the data's own images do not show their maps, as the judge sees it."""
    for metric in map(find_metric, reference.scores):
        value = reference.value(metric.name)
        if metric.is_merit and value < LEAST_OF_REFERENCE:
            warnings.warn(
                f"the data's own images score {metric.label} {value:.2f} only: their maps do not fit them, "
                "or were made in another way than those they are compared with. Expect no more of a method",
                stacklevel=3,
            )


def _settings(config: EvaluationConfig, data: str, base: str, dtype: torch.dtype) -> dict[str, Any]:
    """All that decides the images. Paths are left out: contents count."""
    fields = dataclasses.asdict(config)
    for name in (*SCORING_FIELDS, "dtype"):
        del fields[name]
    fields["base"], fields["data"] = (
        config.base.path,
        {
            name: value
            for name, value in fields["data"].items()
            if name in ("kind", "condition", "count", "resolution", "split")
        },
    )
    fields |= {"data_sha256": data, "base_sha256": base, "dtype": str(dtype).split(".")[1]}
    fields["versions"] = versions()
    settings: dict[str, Any] = json.loads(json.dumps(fields))
    return settings


def _stores(config: EvaluationConfig, out: Path, names: Iterable[str]) -> dict[str, Store]:
    scoring = scoring_sha256(config)
    return {name: Store(out / name, scoring) for name in (REFERENCE, *names)}


def _work(
    config: EvaluationConfig,
    cases: Cases,
    adapters: Mapping[str, Any],
    stores: Mapping[str, Store],
    base: Any,
    scorer: Scorer,
    accelerator: Accelerator,
    show_progress: bool,
) -> None:
    """This process's batches: all methods generate one before the next."""
    all_batches = batches(len(cases), config.batch_size)
    mine = all_batches[accelerator.process_index :: accelerator.num_processes]
    total = sum(map(len, mine)) * len(adapters)
    is_hidden = not (show_progress and accelerator.is_main_process)
    with progress(what="generating and scoring", unit="image", total=total, shown=not is_hidden) as bar:
        for places in mine:
            chosen = None
            for name, store in stores.items():
                has_images = name == REFERENCE or store.has_images(places)
                if store.scores(places) is None or not has_images:
                    chosen = chosen or cases[places.start : places.stop]
                    if name == REFERENCE:
                        images = [case.original for case in chosen]
                    else:
                        with renamed({"images": f"method {name}"}):
                            images = _images(config, store, places, chosen, base, adapters[name])
                    started = time.perf_counter()
                    scores = scorer(images, chosen)
                    scores["score_s"] = np.array(time.perf_counter() - started)
                    store.keep_scores(places, scores)
                bar.set_postfix_str(name, refresh=False)
                bar.update(0 if name == REFERENCE else len(places))


def _images(
    config: EvaluationConfig, store: Store, places: range, chosen: Any, base: Any, adapter: Any
) -> list[Image.Image]:
    """A batch's images, from the folder where they exist."""
    images = store.images(places)
    if images is None:
        started = time.perf_counter()
        images = generate_cases(config, places.start, chosen, base, adapter)
        store.keep_images(places, images, time.perf_counter() - started)
    return images


def settings_of(config: EvaluationConfig, adapter_prompts: Sequence[str] | None = None) -> GenerationSettings:
    """How the config uses a control."""
    return GenerationSettings(
        scale=config.scale,
        policy=config.policy,
        noise_exponent=config.noise_exponent,
        adapter_prompts=adapter_prompts,
    )


def generate_cases(
    config: EvaluationConfig, place: int, cases: Sequence[Case], base: Any, adapter: Any
) -> list[Image.Image]:
    """The images of consecutive cases from `place` on, each from its own noise."""
    reads_nothing = (
        adapter is not None and method_of(adapter).reads_prompt and not config.adapter_reads_prompt
    )
    settings = settings_of(config, [""] * len(cases) if reads_nothing else None)
    images = generate_batch(base, adapter, cases, config.first + place, config.sampling, settings)
    return [Image.fromarray(image) for image in images]
