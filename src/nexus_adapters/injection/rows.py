"""Which row of the UNet's batch reads which condition and which text.

A pipeline hands the UNet R rows: g guidance branches, one behind the other, of R/g images each, in which the
images of one prompt lie next to each other. How many branches and in which order differs between pipelines.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from nexus_adapters.injection.running import Running

# One entry per branch, in order: whether it reads the prompt (else the negative prompt).
Branches = tuple[bool, ...]
# Tells the branches of the prompt embeddings that a pipeline, of a class known to have these attributes or
# variables in its `__call__`, is using now.
Layout = Callable[[Any, Mapping[str, Any]], Branches]


def _single(_: Any, __: Mapping[str, Any]) -> Branches:
    return (True,)


def _guided(pipe: Any, _: Mapping[str, Any]) -> Branches:
    return (False, True) if pipe.do_classifier_free_guidance else (True,)


def _guided_by_variable(_: Any, variables: Mapping[str, Any]) -> Branches:
    return (False, True) if variables["do_classifier_free_guidance"] else (True,)


def _instructed(pipe: Any, _: Mapping[str, Any]) -> Branches:
    return (True, False, False) if pipe.do_classifier_free_guidance else (True,)


def _perturbed(pipe: Any, variables: Mapping[str, Any]) -> Branches:
    branches = _guided(pipe, variables)
    return (*branches, True) if pipe.do_perturbed_attention_guidance else branches


# Read from diffusers 0.42, class by class. Only pipelines that tell at every call whether they guide.
_LAYOUTS: dict[Layout, str] = {
    _guided: """
        StableDiffusionPipeline StableDiffusionImg2ImgPipeline StableDiffusionInpaintPipeline
        StableDiffusionDepth2ImgPipeline StableDiffusionNexusPipeline
        StableDiffusionXLPipeline StableDiffusionXLImg2ImgPipeline StableDiffusionXLInpaintPipeline
        StableDiffusionControlNetPipeline StableDiffusionControlNetImg2ImgPipeline
        StableDiffusionControlNetInpaintPipeline
        StableDiffusionXLControlNetPipeline StableDiffusionXLControlNetImg2ImgPipeline
        StableDiffusionXLControlNetInpaintPipeline StableDiffusionXLControlNetUnionPipeline
        StableDiffusionXLControlNetUnionImg2ImgPipeline StableDiffusionXLControlNetUnionInpaintPipeline
        StableDiffusionAdapterPipeline StableDiffusionXLAdapterPipeline StableDiffusionXLNexusPipeline
        KolorsPipeline KolorsImg2ImgPipeline
    """,
    _guided_by_variable: "StableDiffusionSAGPipeline",
    _instructed: "StableDiffusionInstructPix2PixPipeline",
    _perturbed: """
        StableDiffusionPAGPipeline StableDiffusionPAGImg2ImgPipeline StableDiffusionPAGInpaintPipeline
        StableDiffusionXLPAGPipeline StableDiffusionXLPAGImg2ImgPipeline StableDiffusionXLPAGInpaintPipeline
        StableDiffusionControlNetPAGPipeline StableDiffusionControlNetPAGInpaintPipeline
        StableDiffusionXLControlNetPAGPipeline StableDiffusionXLControlNetPAGImg2ImgPipeline
        KolorsPAGPipeline
    """,
    _single: "LatentConsistencyModelPipeline LatentConsistencyModelImg2ImgPipeline",
}
KNOWN_PIPELINES = {name: layout for layout, names in _LAYOUTS.items() for name in names.split()}


def layout_of(pipe: DiffusionPipeline | None) -> Layout | None:
    """The function that tells the pipeline's branches; None for an unknown pipeline, and for no pipeline.

    What counts is the class whose `__call__` runs: a subclass that keeps it keeps the layout, and one with a
    loop of its own is unknown, whatever it inherits from.
    """
    for cls in type(pipe).__mro__:
        if "__call__" in vars(cls):
            is_ours = cls.__module__.split(".")[0] in ("diffusers", "nexus_adapters")
            return KNOWN_PIPELINES.get(cls.__name__) if is_ours else None
    return None


@dataclass(frozen=True)
class CallLayout:
    """What a call's rows are.

    Attributes:
        text: the prompt embeddings of all branches.
        branches: of the text; None where they are not known, and each row is on its own.
        called: how many of the branches the call has, from the first on; None for all.
    """

    text: Tensor
    branches: Branches | None
    called: int | None = None


def call_layout(running: Running, policy: str, text: Tensor) -> CallLayout:
    """The layout of the call that the running pipeline is making now with these prompt embeddings.

    ValueError as `check_policy`.
    """
    check_policy(running.pipe, policy)
    layout = layout_of(running.pipe)
    if layout is None:
        return CallLayout(text, None)
    branches = layout(running.pipe, running.variables)
    whole = running.variables.get("prompt_embeds")
    if layout is _guided_by_variable and isinstance(whole, Tensor) and len(text) < len(whole):
        # Self-attention guidance calls once more, for the negatives alone: they get what they got before.
        return CallLayout(whole, branches, called=1)
    return CallLayout(text, branches)


def check_policy(pipe: DiffusionPipeline | None, policy: str) -> None:
    """ValueError where the policy must know the layout and the pipeline is unknown, or none was given."""
    if policy != "per_branch" and layout_of(pipe) is None:
        received = (
            "a call of the bare UNet"
            if pipe is None
            else f"a {type(pipe).__name__}, whose layout is not known"
        )
        raise ValueError(
            f'policy: expected "per_branch", which needs no knowledge of how the rows of a batch are laid '
            f'out (but latents of the whole image: tiles would each get the whole map); received "{policy}" '
            f"for {received}"
        )


@dataclass(frozen=True)
class RowPlan:
    """How a call's rows are computed.

    The adapter runs on the rows `first` to `first + count` of the text, with each condition repeated `repeat`
    times in place, and the whole then `tile` times. Its features, the first `kept` of them where that is not
    None, are laid out once per entry of `factors`.
    """

    first: int
    count: int
    repeat: int
    tile: int
    factors: tuple[float, ...]
    kept: int | None = None

    @property
    def computed(self) -> tuple[int, int, int, int]:
        """What the adapter's features depend on."""
        return self.first, self.count, self.repeat, self.tile


def plan_rows(policy: str, layout: CallLayout, conditions: int) -> RowPlan:
    """The plan for a call with `conditions` conditions; ValueError if they do not divide."""
    rows, branches = len(layout.text), layout.branches
    kept = None if layout.called is None or branches is None else rows // len(branches) * layout.called
    if branches is None or (policy == "per_branch" and conditions == 1):
        if conditions not in (1, rows):
            raise ValueError(
                f"condition: expected 1 or {rows}, one for each row of the batch, since the layout of the "
                f"rows is not known here; received {conditions}"
            )
        return RowPlan(0, rows, rows // conditions, 1, (1.0,), kept)
    if rows % len(branches):
        raise ValueError(
            f"encoder_hidden_states: expected a multiple of {len(branches)} rows, the pipeline's guidance "
            f'branches; received {rows}. Where a pipeline runs its branches apart, use policy="per_branch"'
        )
    images = rows // len(branches)
    if images % conditions:
        raise ValueError(
            f"condition: expected 1, or a number that divides the {images} images of the call (prompts times "
            f"images per prompt); received {conditions}"
        )
    if policy == "per_branch":
        return RowPlan(0, rows, images // conditions, len(branches), (1.0,), kept)
    factors = tuple(1.0 if positive or policy == "positive" else 0.0 for positive in branches)
    return RowPlan(branches.index(True) * images, images, images // conditions, 1, factors[: layout.called])
