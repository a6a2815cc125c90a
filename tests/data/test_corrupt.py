"""200 images of which 40 are corrupt, as the layer below training sees them."""

import json
import random
import warnings
from collections import Counter, defaultdict
from itertools import chain

import numpy as np
import pytest
from tests.data.image_files import DAMAGED, GOOD, encoded, picture
from tests.data.tar_files import tar
from torch.utils.data import DataLoader, Dataset

from nexus_adapters.data.conditioned import fit_sample
from nexus_adapters.data.crop import Geometry
from nexus_adapters.data.feed import SampleOrder
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.replacement import read_or_replace
from nexus_adapters.data.samples import BadSample
from nexus_adapters.data.tars import TarSource

COUNT, BAD_COUNT = 200, 40
GEOMETRY = Geometry.bucketed(32, step=8)


def contents():
    """Name and content of each file, the damaged ones spread by chance; and the names of those."""
    draw = random.Random(0)
    bad = sorted(draw.sample(range(COUNT), BAD_COUNT))
    files, damaged = {}, []
    for index in range(COUNT):
        if index in bad:
            kind, content = list(DAMAGED.items())[bad.index(index) % len(DAMAGED)]
            damaged.append(f"{index:03d}-{kind}")
            files[damaged[-1]] = content
        elif index % 4 == 0:
            kind, content = list(GOOD.items())[index // 4 % len(GOOD)]
            files[f"{index:03d}-{kind}"] = content
        else:
            files[f"{index:03d}.png"] = encoded(picture(index, *[(24, 16), (16, 24), (20, 20)][index % 3]))
    return files, damaged


FILES, BAD_NAMES = contents()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    for name, content in FILES.items():
        if content is not None:
            (path / name).write_bytes(content)
    rows = [json.dumps({"file_name": name, "text": f"the {name}"}) for name in FILES]
    (path / "metadata.jsonl").write_text("\n".join(rows))
    return path


def members(files):
    for name, content in files:
        stem, _, kind = name.partition(".")
        if content is not None:  # what is missing has its text only
            yield f"{stem}.{kind}", content
        yield f"{stem}.txt", b"a caption"


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    path = tmp_path_factory.mktemp("tars")
    listed = list(FILES.items())
    for shard in range(4):
        (path / f"{shard}.tar").write_bytes(tar(members(listed[shard * 50 : shard * 50 + 50])))
    return path


@pytest.fixture(params=["folder", "tars"])
def source(request, folder, tars):
    if request.param == "folder":
        return FolderSource(folder)
    return TarSource([str(tars / "{0..3}.tar")], index_folder=tars / "index")


def fitted(source, index):
    return fit_sample(source, index, GEOMETRY, "canny", {})


def test_there_are_forty_of_at_least_eight_kinds():
    assert len(FILES) == COUNT
    assert len(BAD_NAMES) == len(set(BAD_NAMES)) == BAD_COUNT
    kinds = Counter(name[4:] for name in BAD_NAMES)
    assert len(kinds) == len(DAMAGED) >= 8
    assert {name[4:] for name in FILES if name not in BAD_NAMES} >= set(GOOD)


def test_just_the_forty_are_bad_each_with_its_name(source):
    found, wrong = {}, []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 200 images may not give 200 lines
        for index in range(len(source)):
            try:
                sample = fitted(source, index)
            except BadSample as error:
                found[source.key(index)] = str(error)
            else:
                if sample.condition.size != sample.image.size or sample.image.size not in GEOMETRY.buckets:
                    wrong.append(sample.key)
    assert wrong == []
    is_tar = isinstance(source, TarSource)
    assert [key.rpartition("/")[2] for key in found] == [
        n.partition(".")[0] if is_tar else n for n in BAD_NAMES
    ]
    assert all(key in reason and "\n" not in reason for key, reason in found.items())


def candidates(source):
    """The indices of each bucket, as far as headers tell."""
    buckets = defaultdict(list)
    for index in range(len(source)):
        try:
            buckets[GEOMETRY.target(source.size(index))].append(index)
        except BadSample:
            continue
    return buckets


class Reading(Dataset):
    """Reads with replacement, in this process or another."""

    def __init__(self, source, buckets):
        self.source = source
        self.candidates = {index: members for members in buckets.values() for index in members}

    def __getitem__(self, index):
        return read_or_replace(
            index, self.candidates[index], lambda other: fitted(self.source, other), self.source.key
        )


def run(source, workers, batch_size=4, epochs=2):
    """(asked, given, pixels) of every sample in the order of the steps, and the reports by key."""
    buckets = candidates(source)
    order = SampleOrder(
        {i: target for target, members in buckets.items() for i in members}, batch_size, seed=0
    )
    steps = 0
    while order.epoch_of(steps) < epochs:
        steps += 1
    asked = [order.at(step).tolist() for step in range(steps)]
    loader = DataLoader(Reading(source, buckets), batch_sampler=asked, num_workers=workers, collate_fn=list)
    given, reported = [], {}
    for batch in loader:
        assert len({found.content.image.size for found in batch}) == 1
        given += [(found.index, found.content.image.tobytes()) for found in batch]
        reported |= {skipped.key: skipped.reason for found in batch for skipped in found.skipped}
    return list(zip(chain.from_iterable(asked), given, strict=True)), reported


def test_two_epochs_complete_with_the_same_replacements_in_any_process(source):
    samples, reported = run(source, workers=0)
    assert run(source, workers=2) == (samples, reported)
    answers = defaultdict(set)
    for asked, (index, _) in samples:
        answers[source.key(asked)].add(source.key(index))
    assert all(len(keys) == 1 for keys in answers.values())  # in both epochs
    bad = {source.key(index) for index, name in enumerate(FILES) if name in BAD_NAMES}
    assert {key for key, given in answers.items() if given != {key}} == set(reported) <= bad
    without_size = {source.key(index) for index in range(COUNT)} - set(answers)
    assert without_size | set(reported) == bad  # all forty are found, by their header or in decoding
    assert min(len(without_size), len(reported)) >= 5


def test_what_stands_in_is_the_next_whole_sample(source):
    bad = [index for index, name in enumerate(FILES) if name in BAD_NAMES]
    for index in bad:
        found = read_or_replace(index, range(COUNT), lambda other: fitted(source, other), source.key)
        following = [other % COUNT for other in range(index, index + COUNT)]
        assert found.index == next(other for other in following if other not in bad)
        assert [skipped.index for skipped in found.skipped] == following[: following.index(found.index)]
        assert np.array_equal(found.content.image, fitted(source, found.index).image)
