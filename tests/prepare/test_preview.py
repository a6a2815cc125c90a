from dataclasses import replace

from tests.prepare.sets import make

from nexus_adapters.data.sample_page import ROWS
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.prepare.plan import Plan


def test_the_page_shows_samples_from_all_over_the_set(tmp_path):
    make(Plan(SceneSource(60), {"canny": {}, "sketch": {}}, shard_size=7), tmp_path)
    page = (tmp_path / "preview.html").read_text()
    assert page.count("<figure>") == ROWS == 12
    assert page.count("<img ") == 36
    assert [f"{index:09d}" in page for index in (0, 5, 55)] == [True] * 3
    assert "Samples: 60. Shards: 9. Left out: none." in page
    assert "http" not in page  # everything is in it


class ScriptedSource(SceneSource):
    def load(self, index):
        return replace(super().load(index), captions=("<script>alert(1)</script> & 世界",))


def test_captions_cannot_write_into_the_page(tmp_path):
    make(Plan(ScriptedSource(2), {"canny": {}}), tmp_path)
    page = (tmp_path / "preview.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; 世界" in page
    assert page.count("<figure>") == 2
