"""The embedded world: scenes of colored shapes, of which image, caption and structure maps are known exactly.

A scene (`scene`) is drawn from a seed, and becomes an image (`render`), structure maps (`maps`) and a caption
(`caption`). `scene_source` makes training samples of scenes. `held_out` has the scenes that training never
sees, and scores images against them. `pipeline` has `load_embedded`, which loads the models trained on them.
"""
