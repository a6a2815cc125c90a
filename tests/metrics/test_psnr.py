import math

import numpy as np
import pytest
from tests.refusals import refused

from nexus_adapters.metrics.psnr import psnr_db

GREY = np.full((4, 6, 3), 100, np.uint8)


def test_is_twenty_log_of_peak_over_an_even_error():
    assert psnr_db(GREY + 10, GREY) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr_db(GREY, GREY + 10) == psnr_db(GREY + 10, GREY)


def test_an_error_in_a_part_counts_by_its_share():
    image = GREY.copy()
    image[:1] = 255  # a quarter of the pixels
    assert psnr_db(image, GREY) == pytest.approx(20 * math.log10(255 / 155) + 10 * math.log10(4))


def test_equal_images_are_infinitely_close():
    assert psnr_db(GREY, GREY.copy()) == math.inf


def test_other_input_is_refused():
    with refused("image", received="float64", expected="uint8"):
        psnr_db(GREY / 255, GREY)
    with refused("reference", received="(4, 5, 3)", expected="(4, 6, 3)"):
        psnr_db(GREY, GREY[:, :5])
