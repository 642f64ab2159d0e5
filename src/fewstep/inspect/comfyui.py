"""The prompt and settings in a ComfyUI PNG, read from the graph of nodes that it stores as JSON."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep import images
from fewstep.errors import InputError, quoted

LARGEST_GRAPH = 4_000_000  # characters
MOST_NODES = 10_000
NAMES = {  # ours, and what nodes call it
    "steps": ("steps",),
    "sampler": ("sampler_name",),
    "schedule": ("scheduler",),
    "guidance_scale": ("cfg", "guidance"),
    "seed": ("seed", "noise_seed"),
    "width": ("width",),
    "height": ("height",),
    "model": ("ckpt_name", "unet_name", "model_name"),
}
TEXTS = ("text", "text_g", "t5xxl", "prompt", "string", "value")
WIDGETS = {  # of a saved workflow, whose values have places instead of names
    "KSampler": {"seed": 0, "steps": 2, "guidance_scale": 3, "sampler": 4, "schedule": 5},
    "CheckpointLoaderSimple": {"model": 0},
    "EmptyLatentImage": {"width": 0, "height": 1},
}
Node = Mapping[str, Any]
Graph = Mapping[str, Node]


def read_settings(path: Path) -> dict[str, Any] | None:
    """The prompt and settings in the PNG at `path`, as far as they are found; None if ComfyUI did not write it."""
    try:
        with Image.open(path, formats=images.FORMATS) as image:
            chunks = [image.info.get(name) for name in ("prompt", "workflow")]
        graph, workflow = (_json(chunk) for chunk in chunks)
    except images.UNREADABLE as error:
        raise InputError(f"{quoted(path)} cannot be read as an image: {error}") from error
    nodes = {name: node for name, node in graph.items() if isinstance(node, dict) and _inputs(node)}
    if nodes:
        return settings_of(nodes)
    listed = workflow.get("nodes")
    return _of_workflow(listed) if isinstance(listed, list) else None


def settings_of(graph: Graph) -> dict[str, Any]:
    """The settings of the first sampling node and of the nodes before it; samplers and models by ComfyUI's names."""
    start = next((name for name, node in graph.items() if {"positive", "sampler"} & _inputs(node).keys()), None)
    start = next((name for name, node in graph.items() if {"steps", "sampler_name"} <= _inputs(node).keys()), start)
    if start is None:
        return {}
    before = list(_before(graph, start))
    settings: dict[str, Any] = {
        "prompt": _text(graph, before, ("positive", "conditioning")),
        "negative_prompt": _text(graph, before, ("negative",)),
    }
    for name, keys in NAMES.items():
        values = (_inputs(node).get(key) for node in before for key in keys)
        settings[name] = next((value for value in values if isinstance(value, str | int | float)), None)
    return {name: value for name, value in settings.items() if value is not None}


def _text(graph: Graph, before: list[Node], links: tuple[str, ...]) -> str | None:
    """The first text behind one of these links."""
    for link in (_inputs(node).get(name) for node in before for name in links):
        for node in _before(graph, _target(link)):
            values = (_inputs(node).get(key) for key in TEXTS)
            if text := next((value for value in values if isinstance(value, str)), None):
                return text
    return None


def _before(graph: Graph, start: str | None) -> Iterator[Node]:
    """The node called `start` and all that it depends on, the nearest first."""
    waiting, visited = deque([start]), {start}
    while waiting and len(visited) < MOST_NODES:
        node = graph.get(waiting.popleft() or "")
        if node is None:
            continue
        yield node
        following = [_target(value) for value in _inputs(node).values()]
        waiting.extend(dict.fromkeys(name for name in following if name is not None and name not in visited))
        visited.update(following)


def _of_workflow(nodes: list[Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for node in nodes:
        values = node.get("widgets_values") if isinstance(node, dict) else None
        if not isinstance(values, list) or not isinstance(node.get("type"), str):
            continue
        for name, place in WIDGETS.get(node["type"], {}).items():
            if place < len(values) and isinstance(values[place], str | int | float):
                settings.setdefault(name, values[place])
        if node["type"] == "CLIPTextEncode" and values and isinstance(values[0], str):
            settings.setdefault("prompts", []).append(values[0])
    return settings


def _target(link: Any) -> str | None:
    """The node that a link leads to; None for a plain value."""
    return link[0] if isinstance(link, list) and len(link) == 2 and isinstance(link[0], str) else None


def _inputs(node: Node) -> Mapping[str, Any]:
    inputs = node.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def _json(text: Any) -> dict[str, Any]:
    """The object that a chunk holds; an empty one where it holds something else."""
    if not isinstance(text, str) or len(text) > LARGEST_GRAPH or not text.lstrip().startswith("{"):
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
