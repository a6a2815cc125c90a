"""Every example shows what its prompt says, where its map has it, with the embedded weights."""

import numpy as np
import pytest
from PIL import Image

from nexus_adapters.app.examples import examples_for
from nexus_adapters.app.form import Form
from nexus_adapters.app.models import NO_ADAPTER, Models
from nexus_adapters.conditions import extract
from nexus_adapters.embedded.held_out import TestScene, score_images
from nexus_adapters.embedded.render import render


@pytest.mark.full
def test_examples_succeed_on_the_first_click(tmp_path):
    models = Models()
    for example in examples_for(models):
        request = Form(example.controls, prompt=example.prompt, seed=example.seed).request(models, tmp_path)
        rendering = render(example.scene)
        edges = extract("canny", Image.fromarray(rendering.image))
        expected = TestScene(example.scene, rendering, edges, prompt="")
        names = [name for name in example.names if name != NO_ADAPTER]
        for name, each in models.requests(request, names):
            found = score_images([np.asarray(models.generate(each).image)], [expected])
            assert found["binding_color"][0] == found["background"][0] == 1, (example.title, name)
            assert found["edge_f1"][0] > 0.75, (example.title, name)
