"""The command and the Python code that generate an image of the page again, bit for bit."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nexus_adapters.bundled import BUNDLED, EMBEDDED, guidance_for
from nexus_adapters.choices import DEFAULT_POLICY
from nexus_adapters.files import without_folder
from nexus_adapters.generation.requests import (
    BaseRequest,
    ControlRequest,
    GenerateRequest,
    MapSource,
)

_WIDTH = 78  # of the command's lines
_PYTHON_WIDTH = 68  # of a call on one line
# Argument of a control -> its option, in the order of the command's help.
_PER_CONTROL = (
    "condition_name",
    "adapter",
    "scale",
    "start",
    "end",
    "policy",
    "noise_exponent",
    "balance",
    "level_scales",
    "mask",
    "resize_mode",
)
_OPTIONS = {"condition_name": "condition"}


def command_line(request: GenerateRequest, out: str = "image.png") -> list[str]:
    """Return the arguments of the command that generates the image; they parse to the same request."""
    arguments = _option("prompt", request.prompt)
    if request.negative:
        arguments += _option("negative", request.negative)
    for control in request.controls:
        arguments += _option(control.given.argument, control.given.file)
    for name in _PER_CONTROL:
        values = [_shown(name, getattr(control, name)) for control in request.controls]
        is_required = name == "adapter" and request.base.path not in BUNDLED
        if is_required or any(getattr(control, name) != _CONTROL[name] for control in request.controls):
            for value in values[:1] if len(set(values)) == 1 else values:
                arguments += _option(_OPTIONS.get(name, name), value)
    first = request.controls[0]
    if first.invert is not None:
        arguments.append("--invert" if first.invert else "--no-invert")
    if first.max_megapixels != _CONTROL["max_megapixels"]:
        arguments += _option("max_megapixels", _number(first.max_megapixels))
    arguments += _base_options(request.base)
    for lora in request.loras:
        arguments += _option("lora", lora.path)
    for lora in request.loras:
        arguments += _option("lora_scale", _number(lora.scale))
    for name in ("device", "dtype", "scheduler", "steps", "seed", "width", "height"):
        value = getattr(request, name)
        if value != _DEFAULTS[name]:
            arguments += _option(name, str(value))
    if request.guidance != guidance_for(request.base.path):
        arguments += _option("guidance", _number(request.guidance))
    return ["nexus", "generate", *arguments, *_option("out", out)]


_CONTROL: dict[str, Any] = {each.name: each.default for each in fields(ControlRequest)}
_DEFAULTS: dict[str, Any] = {each.name: each.default for each in fields(GenerateRequest)}


def _base_options(base: BaseRequest) -> list[str]:
    given = {"base": base.path, "base_config": base.config, "prediction_type": base.prediction_type}
    return [
        part
        for name, value in given.items()
        if value not in (None, EMBEDDED)
        for part in _option(name, value)
    ]


def _option(name: str, value: str | None) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    text = "" if value is None else value
    return [f"{option}={text}"] if text.startswith("-") else [option, text]


def _shown(name: str, value: Any) -> str:
    if name == "policy" and value is None:
        return DEFAULT_POLICY
    if isinstance(value, tuple):
        return ",".join(_number(each) for each in value)
    return _number(value) if isinstance(value, float | int) else str(value)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(value)


def command_text(request: GenerateRequest, out: str = "image.png") -> str:
    """Return the command in lines for a shell."""
    words = [shlex.quote(word) for word in command_line(shareable(request), out)]
    lines = [" ".join(words[:2])]
    place = 2
    while place < len(words):
        has_value = (
            place + 1 < len(words) and "=" not in words[place] and not words[place + 1].startswith("--")
        )
        part = " ".join(words[place : place + (2 if has_value else 1)])
        place += 2 if has_value else 1
        if len(lines[-1]) + len(part) + 1 > _WIDTH:
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}"
    return " \\\n".join(lines)


def shareable(request: GenerateRequest) -> GenerateRequest:
    """Return the request with each path reduced to its last part: the page shows nobody's folders."""

    def adapter_of(source: str) -> str:
        name = without_folder(source)
        bundle = BUNDLED.get(request.base.path)
        is_folder = name != source and bundle is not None and bundle.has_adapter(name)
        return f"./{name}" if is_folder else name

    def control_of(control: ControlRequest) -> ControlRequest:
        return replace(
            control,
            given=replace(control.given, file=Path(control.given.file).name),
            adapter=adapter_of(control.adapter),
            mask=control.mask and Path(control.mask).name,
        )

    base = replace(
        request.base,
        path=without_folder(request.base.path),
        config=request.base.config and without_folder(request.base.config),
    )
    return replace(request, base=base, controls=tuple(map(control_of, request.controls)))


def files_of(request: GenerateRequest) -> list[str]:
    """Return the files that a request reads: pictures, maps and masks, each once."""
    files = [file for control in request.controls for file in (control.given.file, control.mask) if file]
    return list(dict.fromkeys(files))


def python_code(request: GenerateRequest, settings: dict[str, Any]) -> str:
    """Return the Python code that generates the image.

    Args:
        request: the request.
        settings: those of the image, which hold its size, device and precision.
    """
    from nexus_adapters.conditions import EXTRACTORS

    shown = shareable(request)
    size = (settings["width"], settings["height"])
    lines = [*_models_code(shown, settings), ""]
    many = len(shown.controls) > 1
    names = [f"control_{place}" if many else "control" for place in range(1, len(shown.controls) + 1)]
    for name, control in zip(names, shown.controls, strict=True):
        kind = EXTRACTORS[control.condition_name].kind
        adapter = _adapter_code(control, shown.base, settings)
        lines += [adapter, *_map_code(control, size), *_control_code(name, control, kind), ""]
    lines += [f"with attach(pipe, {', '.join(names)}):", *_call_code(shown, size), 'image.save("image.png")']
    body = "\n".join(lines)
    used = [
        name for name in ("Control", "attach", "extract", "load_adapter", "load_base") if f"{name}(" in body
    ]
    imports = ["import torch", "from PIL import Image", "", *_import_code(used)]
    if "BaseSource(" in body:
        imports.append("from nexus_adapters.bases.loading import BaseSource")
    if "placement(" in body:
        imports.append("from nexus_adapters.conditions.resize import padded, placement")
    return "\n".join([*imports, "", body, ""])


def _import_code(names: list[str]) -> list[str]:
    line = f"from nexus_adapters import {', '.join(names)}"
    if len(line) <= _PYTHON_WIDTH:
        return [line]
    return ["from nexus_adapters import (", f"    {', '.join(names)},", ")"]


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _models_code(request: GenerateRequest, settings: dict[str, Any]) -> list[str]:
    more = "" if settings["dtype"] == "float32" else f", dtype=torch.{settings['dtype']}"
    base = request.base
    source = _literal(base.path)
    if base.config or base.prediction_type:
        given = {"config": base.config, "prediction_type": base.prediction_type}
        extra = "".join(f", {name}={_literal(value)}" for name, value in given.items() if value)
        source = f"BaseSource({_literal(base.path)}{extra})"
    lines = [f"pipe = load_base({source}{more})"]
    if settings["device"] != "cpu":
        lines.append(f'pipe.to("{settings["device"]}")')
    return lines


def _adapter_code(control: ControlRequest, base: BaseRequest, settings: dict[str, Any]) -> str:
    arguments = [_literal(control.adapter)]
    if base.path == EMBEDDED:
        arguments.append(f"condition={_literal(control.condition_name)}")
    else:
        arguments.append(f"base={_literal(base.path)}")
    if settings["dtype"] != "float32":
        arguments.append(f"dtype=torch.{settings['dtype']}")
    moved = "" if settings["device"] == "cpu" else f'.to("{settings["device"]}")'
    return f"adapter = load_adapter({', '.join(arguments)}){moved}"


def _map_code(control: ControlRequest, size: tuple[int, int]) -> list[str]:
    file = _literal(control.given.file)
    if isinstance(control.given, MapSource):
        return [f"structure = Image.open({file})"]
    condition = control.condition_name
    if control.resize_mode is None:
        return [
            f"picture = Image.open({file})",
            f"picture = picture.resize({size}, Image.Resampling.LANCZOS)",
            f"structure = extract({_literal(condition)}, picture)",
        ]
    from nexus_adapters.conditions import EXTRACTORS

    return [
        f"picture = Image.open({file})",
        f"placed = placement((0, 0, *picture.size), {size}, {_literal(control.resize_mode)})",
        "picture = picture.resize(placed.size, Image.Resampling.LANCZOS, box=placed.box)",
        f"structure = extract({_literal(condition)}, picture)",
        f"structure = padded(structure, placed, {size}, {_literal(EXTRACTORS[condition].kind)})",
    ]


def _control_code(name: str, control: ControlRequest, kind: str) -> list[str]:
    arguments: dict[str, Any] = {"kind": kind}
    is_map = isinstance(control.given, MapSource)
    invert = control.invert if is_map or control.invert else False
    if invert is not None:
        arguments["invert"] = invert
    defaults = ControlRequest(control.given)
    for argument, value in control.settings().items():
        if value != (DEFAULT_POLICY if argument == "policy" else getattr(defaults, argument)):
            arguments[argument] = value
    texts = [f"{argument}={_literal(value)}" for argument, value in arguments.items()]
    if control.mask is not None:
        texts.append(f"mask=Image.open({_literal(control.mask)})")
    first = f"{name} = Control(adapter, structure, "
    lines = [first + ", ".join(texts) + ")"]
    if len(lines[0]) <= _PYTHON_WIDTH:
        return lines
    return [f"{name} = Control(", "    adapter,", "    structure,", *(f"    {text}," for text in texts), ")"]


def _call_code(request: GenerateRequest, size: tuple[int, int]) -> list[str]:
    negative = [f"        negative_prompt={_literal(request.negative)},"] if request.negative else []
    return [
        "    image = pipe(",
        f"        {_literal(request.prompt)},",
        *negative,
        f"        num_inference_steps={request.steps},",
        f"        guidance_scale={request.guidance!r},",
        f"        width={size[0]},",
        f"        height={size[1]},",
        f"        generator=torch.Generator().manual_seed({request.seed}),",
        "    ).images[0]",
    ]
