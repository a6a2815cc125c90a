import pickle

import pytest

from nexus_adapters.data.samples import BadSample, Source


def test_a_bad_sample_comes_back_from_another_process_as_it_was():
    error = pickle.loads(pickle.dumps(BadSample("image: expected a readable image, got 'a'")))
    assert type(error) is BadSample
    assert str(error) == "image: expected a readable image, got 'a'"
    with pytest.raises(ValueError, match="got 'a'"):
        raise error


def test_what_lacks_a_method_is_no_source():
    assert not isinstance([1, 2], Source)
