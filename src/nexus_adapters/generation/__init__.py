"""From a request to an image: requests, models, structure maps, generation, and the settings in a PNG.

The command line and the web app both generate through this package, so the same request gives the same image.
Modules import torch and other slow libraries only inside functions.
"""
