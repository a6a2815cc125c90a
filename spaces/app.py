"""A Hugging Face Space for the free CPU hardware: the page of `nexus app` with the embedded models.

Run it on your machine with `pip install "nexus-adapters[embedded,app]"` and `nexus app`.
"""

import os

from nexus_adapters.app.models import Models
from nexus_adapters.app.page import build
from nexus_adapters.app.server import serve


def main() -> None:
    """Serve the page where the Space expects it."""
    models = Models()
    models.load()
    hosts = [name for name in os.environ.get("SPACE_HOST", "").split(",") if name]
    serve(
        lambda: build(models),
        host="0.0.0.0",
        on_ready=print,
        allowed_hosts=hosts,
        framed_by=["https://huggingface.co"],
    )


if __name__ == "__main__":
    main()
