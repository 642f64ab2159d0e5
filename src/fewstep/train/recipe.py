"""Recipes: the user's Python files with a function `stages(out)`; errors raised in them name the recipe's own lines."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from fewstep.errors import InputError, quoted
from fewstep.train.plan import Plan
from fewstep.train.stages import RecipeStage

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARIES = (str(PACKAGE), *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")))
PACKAGES = {"site-packages", "dist-packages"}


class RecipeError(InputError):
    """The user's code raised; the message holds the frames of it that are the user's, and its own error."""


def recipe_stages(recipe: Path, out: Path) -> dict[str, RecipeStage]:
    """The stages of a recipe by name: what its `stages(out)` returns; they keep what they make below `out`.

    Raises `InputError` for a file that is no recipe, and passes on what the recipe raises (see `recipe_error`).
    """
    if not recipe.is_file():
        raise InputError(f"there is no recipe {recipe}; give the path of a Python file such as recipes/sd_v1_4.py")
    stages = getattr(_imported(recipe), "stages", None)
    signature = "stages(out: Path) -> Sequence[RecipeStage]"
    if not callable(stages):
        raise InputError(f"{recipe} has no function {signature}, so it is not a recipe")
    try:
        inspect.signature(stages).bind(out)
    except TypeError as error:
        raise InputError(
            f"{recipe}: stages cannot be called with the output folder alone ({error}); {signature}"
        ) from None
    return _named(recipe, stages(out))


def recipe_error(error: Exception, recipe: Path) -> RecipeError | None:
    """`error` with the frames that lie in the user's own files; None where it passed through none of them."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_own(frame.filename)]
    if not own and not isinstance(error, SyntaxError):
        return None
    lines = [*traceback.StackSummary.from_list(own).format(), *traceback.format_exception_only(error)]
    if own and own[-1] is not frames[-1]:
        lines.append(
            f"raised in {_shortened(frames[-1].filename)}, line {frames[-1].lineno}; --debug shows the way there"
        )
    where = f", line {own[-1].lineno}" if own else ""
    file = own[-1].filename if own else error.filename or recipe if isinstance(error, SyntaxError) else recipe
    head = f"{_shortened(str(file))}{where}: {type(error).__name__} in code of the recipe"
    return RecipeError(
        "\n".join([head, "".join(line if line.endswith("\n") else f"{line}\n" for line in lines).rstrip()])
    )


def _named(recipe: Path, returned: Any) -> dict[str, RecipeStage]:
    """The stages by name, if that is what was returned."""
    if not isinstance(returned, Sequence) or not returned:
        raise InputError(
            f"{recipe}: stages(out) returned {quoted(returned)}; it must return a list of at least one RecipeStage"
        )
    named: dict[str, RecipeStage] = {}
    for stage in returned:
        if not isinstance(stage, RecipeStage) or not isinstance(stage.plan, Plan) or not hasattr(stage.task, "prepare"):
            raise InputError(
                f"{recipe}: stages(out) returned {quoted(stage)}; each must be a RecipeStage of a task and a Plan"
            )
        if stage.name in named:
            raise InputError(f"{recipe} has two stages in a folder called {stage.name}; give each its own name")
        named[stage.name] = stage
    return named


def _imported(path: Path) -> ModuleType:
    """The module at `path`; its neighbours can be imported from it."""
    sys.path.insert(0, str(path.parent.resolve()))
    name = path.stem if path.stem not in sys.modules else f"recipe_{path.stem}"  # one called random.py hides no other
    spec = importlib.util.spec_from_loader(name, SourceFileLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _is_own(filename: str) -> bool:
    """Whether a frame's file is neither fewstep's, nor Python's, nor that of an installed package."""
    if filename.startswith("<"):
        return False
    path = Path(filename).resolve()
    return not PACKAGES.intersection(path.parts) and not any(path.is_relative_to(library) for library in LIBRARIES)


def _shortened(filename: str) -> str:
    path = Path(filename)
    if path.is_relative_to(PACKAGE):
        return str(path.relative_to(PACKAGE.parent))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename
