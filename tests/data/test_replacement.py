import random

import pytest
from tests.refusals import refused

from nexus_adapters.data.feed import Skipped
from nexus_adapters.data.replacement import read_or_replace
from nexus_adapters.data.samples import BadSample

BAD = {2, 5, 6, 9}


class Reading:
    def __init__(self, bad):
        self.bad, self.asked = bad, []

    def __call__(self, index):
        self.asked.append(index)
        if index in self.bad:
            raise BadSample(f"{index} is bad")
        return f"content {index}"


def key(index):
    return f"key {index}"


def test_a_readable_sample_is_read_and_no_other():
    read = Reading(BAD)
    found = read_or_replace(3, range(1_000_000_000), read, key)
    assert (found.index, found.content, found.skipped) == (3, "content 3", ())
    assert read.asked == [3]


def test_the_next_readable_one_stands_in():
    found = read_or_replace(5, range(10), Reading(BAD), key)
    assert (found.index, found.content) == (7, "content 7")
    assert found.skipped == (Skipped(5, "key 5", "5 is bad"), Skipped(6, "key 6", "6 is bad"))


def test_the_first_follows_the_last():
    assert read_or_replace(9, range(10), Reading(BAD), key).index == 0
    assert read_or_replace(9, [2, 5, 7, 9], Reading(BAD), key).index == 7


def test_only_candidates_stand_in():
    assert read_or_replace(5, [1, 5, 8], Reading(BAD), key).index == 8
    assert read_or_replace(5, [1, 8], Reading(BAD), key).index == 8  # need not be one itself
    assert read_or_replace(9, [5, 8], Reading(BAD), key).index == 8


def test_the_answer_does_not_depend_on_the_order_of_asking():
    orders = []
    for seed in range(5):
        indices = list(range(10))
        random.Random(seed).shuffle(indices)
        read = Reading(BAD)
        orders.append({index: read_or_replace(index, range(10), read, key) for index in indices})
    assert all(answers == orders[0] for answers in orders)


def test_all_bad_ends_with_an_error():
    read = Reading({1, 4, 7})
    with refused("data", "3 unreadable ones, the first of them 'key 4' (4 is bad)"):
        read_or_replace(4, [1, 4, 7], read, key)
    assert read.asked == [4, 7, 1]


def test_other_errors_are_not_hidden():
    def read(index):
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        read_or_replace(0, [0, 1], read, key)
