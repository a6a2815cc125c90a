"""The embedded world: scenes of colored shapes whose image, caption and structure maps are known exactly.

A scene (`scene`) is sampled from a seed and turned into an image (`render`), structure maps (`maps`) and a
caption (`caption`). `scene_source` makes training samples from scenes. `held_out` has scenes that training
never sees, and scores images against them. `pipeline` has `load_embedded`, which loads the models trained on
scenes.
"""
