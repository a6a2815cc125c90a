"""Reading the settings that commands embed in their images."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from nexus_adapters.cli.options import SETTINGS_KEY


def read_settings(path: Path) -> dict[str, Any]:
    with Image.open(path, formats=("PNG",)) as image:
        image.load()
        return json.loads(image.info[SETTINGS_KEY])
