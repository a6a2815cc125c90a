from collections import Counter

import numpy as np
import pytest
from tests.refusals import refused

from nexus_adapters.data.batch import draw_for_sample
from nexus_adapters.data.feed import Feed, Read, SampleOrder, permutation

ONE_BUCKET = dict.fromkeys(range(7))
BUCKETS = {index: ("wide", "tall", "square")[(index * index) % 3 % 2 + index % 2] for index in range(23)}


class Unread:
    def read(self, place):
        raise AssertionError("read")


def read(order, steps):
    return [int(index) for step in range(steps) for index in order.at(step)]


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_every_sample_equally_often(batch):
    order = SampleOrder(ONE_BUCKET, batch, seed=3)
    assert set(Counter(read(order, 7 * 4)).values()) == {4 * batch}  # the least number that comes out even
    for epochs in range(1, 5):  # and on the way there, never one more than once ahead of another
        counts = Counter(read(order, epochs * 7 // batch))
        assert max(counts.values()) - min(counts.get(index, 0) for index in ONE_BUCKET) <= 1


def test_every_sample_of_every_bucket_equally_often():
    order = SampleOrder(BUCKETS, 4, seed=0)
    steps = 0
    while order.epoch_of(steps) < 4:  # buckets fill whole batches after as many epochs as a batch has samples
        steps += 1
    assert Counter(read(order, steps)) == dict.fromkeys(BUCKETS, 4)


def test_a_step_is_of_one_bucket():
    order = SampleOrder(BUCKETS, 4, seed=0)
    assert len(set(BUCKETS.values())) == 3
    kinds = [{BUCKETS[int(index)] for index in order.at(step)} for step in range(60)]
    assert all(len(kind) == 1 for kind in kinds)
    assert len(set.union(*kinds)) == 3


def test_buckets_take_turns():
    order = SampleOrder({index: index < 50 for index in range(100)}, 5, seed=0)
    first_epoch = [bool(order.at(step)[0] < 50) for step in range(20)]
    assert sorted(first_epoch) == [False] * 10 + [True] * 10
    assert first_epoch not in ([False] * 10 + [True] * 10, [True] * 10 + [False] * 10)


def test_a_bucket_smaller_than_a_batch_still_comes():
    order = SampleOrder({**dict.fromkeys(range(10), "a"), 10: "b"}, 4, seed=0)
    counts = Counter(read(order, 4 * 11 // 4 * 3))
    assert counts[10] == 4 * (counts[10] // 4) > 0  # whole batches of the one sample


def test_any_step_by_itself_in_any_order():
    steps = list(range(50))
    forward = [SampleOrder(BUCKETS, 4, 1).at(step).tolist() for step in steps]
    order = SampleOrder(BUCKETS, 4, 1)
    backward = [order.at(step).tolist() for step in reversed(steps)][::-1]
    assert forward == backward == [order.at(step).tolist() for step in steps]
    assert order.at(10**6).tolist() == SampleOrder(BUCKETS, 4, 1).at(10**6).tolist()


def test_seed_and_epoch_matter():
    order = SampleOrder(dict.fromkeys(range(40)), 40, seed=0)
    other = SampleOrder(dict.fromkeys(range(40)), 40, seed=1)
    assert sorted(order.at(0)) == sorted(order.at(1)) == sorted(other.at(0)) == list(range(40))
    assert len({tuple(order.at(0)), tuple(order.at(1)), tuple(other.at(0))}) == 3


@pytest.mark.parametrize(("processes", "parts"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_however_a_step_is_split_it_is_the_same(processes, parts):
    order = SampleOrder(dict.fromkeys(range(19)), 4, seed=5)
    batch_size = 4 // (processes * parts)
    feeds = [Feed(order, Unread(), batch_size, parts, rank, processes) for rank in range(processes)]
    for step in range(12):
        places = [place for feed in feeds for part in feed.positions(step) for place in part]
        assert sorted(place.place for place in places) == [0, 1, 2, 3]
        whole = [place.index for place in sorted(places, key=lambda place: place.place)]
        assert whole == SampleOrder(dict.fromkeys(range(19)), 4, seed=5).at(step).tolist()


def test_epochs_end_where_their_samples_do():
    order = SampleOrder(ONE_BUCKET, 2, seed=0)
    assert [order.epoch_of(step) for step in range(11)] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3]
    one = SampleOrder(ONE_BUCKET, 7, seed=0)
    assert [one.epoch_of(step) for step in (0, 1, 5, 10**9)] == [0, 1, 5, 10**9]


def test_a_batch_larger_than_the_data():
    with refused("training.batch_size", 8, expected="at most 7 samples"):
        SampleOrder(ONE_BUCKET, 8, seed=0)


def test_the_first_values_are_pinned():
    """Another NumPy has to give the same: the order of a run that goes on may not change."""
    assert permutation(8, (0, 1, 2)).tolist() == PINNED_PERMUTATION
    order = SampleOrder({index: index % 3 == 0 for index in range(12)}, 3, seed=7)
    assert [order.at(step).tolist() for step in range(6)] == PINNED_ORDER


def test_it_does_not_lean_on_numpys_shuffle(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("numpy may change this stream")

    monkeypatch.setattr(np.random, "Generator", refuse)
    monkeypatch.setattr(np.random, "default_rng", refuse)
    monkeypatch.setattr(np.random, "permutation", refuse)
    assert len(SampleOrder(ONE_BUCKET, 2, seed=0).at(3)) == 2


PINNED_PERMUTATION = [3, 4, 7, 6, 1, 5, 2, 0]
PINNED_ORDER = [[3, 9, 6], [8, 11, 2], [10, 7, 1], [5, 4, 4], [2, 11, 10], [0, 6, 3]]


COUNT, GLOBAL = 30, 12


class Echo:
    """Gives a place as its content."""

    def __init__(self):
        self.reads = 0

    def read(self, place):
        self.reads += 1
        return Read(place, place.index, (place.step, place.place))


def feed(batch_size, parts, rank=0, processes=1, workers=0):
    order = SampleOrder(dict.fromkeys(range(COUNT), ""), GLOBAL, seed=3)
    return Feed(order, Echo(), batch_size, parts, rank, processes, workers)


def indices(reads):
    return {(read.position.place, read.index) for read in reads}


def step(feed, number):
    return [read for part in feed.step(number) for read in part]


@pytest.mark.parametrize(("batch_size", "parts", "processes"), [(12, 1, 1), (3, 4, 1), (2, 3, 2), (4, 1, 3)])
def test_a_step_reads_the_same_however_it_is_shared(batch_size, parts, processes):
    expected = [indices(step(feed(12, 1), number)) for number in range(5)]
    for number in range(5):
        shares = [step(feed(batch_size, parts, rank, processes), number) for rank in range(processes)]
        assert all(len(share) == batch_size * parts for share in shares)
        assert indices(read for share in shares for read in share) == expected[number]


def test_parts_come_one_by_one():
    parts = list(feed(3, 4).step(0))
    assert [[read.position.place for read in part] for part in parts] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9, 10, 11],
    ]


def test_steps_in_a_row_are_those_read_alone():
    one = feed(3, 4)
    for number in (0, 1, 2, 7, 8, 3):
        assert indices(step(one, number)) == indices(step(feed(3, 4), number))


def test_going_on_reads_nothing_of_what_was(monkeypatch):
    late = feed(3, 4)
    step(late, 1000)
    assert late.reader.reads <= GLOBAL + 3


class Failing:
    """Cannot read one place."""

    def __init__(self, error):
        self.error = error

    def read(self, place):
        if place.place == 5:
            raise self.error
        return Read(place, place.index, None)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [ValueError("data: expected a sample"), OSError(5, "no such server")])
def test_an_error_comes_as_it_was_raised(workers, error):
    order = SampleOrder(dict.fromkeys(range(COUNT), ""), GLOBAL, seed=3)
    reads = Feed(order, Failing(error), 3, 4, 0, 1, workers).step(0)
    assert len(next(reads)) == 3
    with pytest.raises(type(error)) as caught:
        next(reads)
    assert str(caught.value) == str(error)


def test_other_processes_read_the_same():
    with_workers = feed(3, 4, workers=2)
    for number in (5, 6):
        assert indices(step(with_workers, number)) == indices(step(feed(3, 4), number))


def test_draws_differ_by_seed_step_and_place_and_never_change():
    first = draw_for_sample(0, 1, 2, (1, 2, 2))
    assert first.timestep == draw_for_sample(0, 1, 2, (1, 2, 2)).timestep
    others = [draw_for_sample(*key, (1, 2, 2)) for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (1, 0, 2))]
    for name in ("timestep", "caption", "prompt_dropout", "condition_dropout"):
        values = [getattr(drawn, name) for drawn in (first, *others)]
        assert len(set(values)) == 5
        assert all(0 <= value < 1 for value in values)
    assert [round(value, 6) for value in (first.timestep, first.caption)] == PINNED


PINNED = [0.1288, 0.206398]
