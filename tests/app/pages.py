"""Values of the page, as tests write them."""

from nexus_adapters.app.canvas import Drawn, png_of


def drawn(image, is_edited=True):
    return Drawn(png_of(image), is_edited)
