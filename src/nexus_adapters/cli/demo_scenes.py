"""What the demo shows: a few test scenes, and for each map several prompts that differ in their colors."""

from dataclasses import replace

from nexus_adapters.evaluation.scenes import TestScene
from nexus_adapters.scenes.caption import caption
from nexus_adapters.scenes.maps import draw_map
from nexus_adapters.scenes.render import render
from nexus_adapters.scenes.scene import Scene, draw_scene
from nexus_adapters.scenes.vocabulary import COLORS, NOVEL_COMBINATIONS

# Test scenes, chosen by their maps: the first of three or more objects that stand at least four pixels
# apart, and one of four that overlap.
SCENE_SEEDS = (8, 6)
PROMPTS_PER_MAP = 3


def demo_scenes(seed: int, condition: str = "canny") -> list[TestScene]:
    """A test scene in its own colors, then in others: the map stays, and is the same image in all of them.

    Only colors change. What an object is made of shows in the map, so other words for it would contradict it.
    """
    first = draw_scene(seed, "test")
    drawn = draw_map(condition, first)
    return [
        TestScene(scene, render(scene), drawn, caption(scene), condition)
        for scene in [first, *other_colors(first)]
    ]


def other_colors(scene: Scene) -> list[Scene]:
    """The scene with all colors exchanged, in as many ways as there are further prompts.

    All colors move on by the same number of places in the table, so that objects that differed still do, and
    none takes the background's. Combinations that training never sees are left to the study.
    """
    moved = [recolor(scene, places) for places in range(1, len(COLORS))]
    seen = [each for each in moved if not has_novel(each)]
    assert len(seen) >= PROMPTS_PER_MAP - 1
    return [seen[len(seen) * index // PROMPTS_PER_MAP] for index in range(1, PROMPTS_PER_MAP)]


def recolor(scene: Scene, places: int) -> Scene:
    """The same objects in the same places, every color `places` further in the table."""
    names = tuple(COLORS)

    def moved(color: str) -> str:
        return names[(names.index(color) + places) % len(names)]

    objects = tuple(replace(item, color=moved(item.color)) for item in scene.objects)
    return replace(scene, objects=objects, background=moved(scene.background))


def has_novel(scene: Scene) -> bool:
    """Whether an object is a combination of shape, color and material that training never sees."""
    return any((item.shape, item.color, item.material) in NOVEL_COMBINATIONS for item in scene.objects)
