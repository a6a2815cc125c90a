import os
import time

from nexus_adapters.data.abandoned import remove_abandoned


def test_what_nobody_has_written_to_for_long_goes(tmp_path):
    for name, age_s in {"old.part": 7200, "new.part": 60, "old.tar": 7200}.items():
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, 2 * (time.time() - age_s,))
    remove_abandoned(tmp_path, "*.part")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.part", "old.tar"]
    remove_abandoned(tmp_path / "nowhere", "*")
