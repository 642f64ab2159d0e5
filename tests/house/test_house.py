"""The rules of the house, checked from the code's own text: floors, sizes, docstrings, dependencies.

Each failure says which line breaks which rule, and what to do. The rules are told in CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "fewstep"
FILES = sorted(SRC.rglob("*.py"))

FACE = "fewstep"  # src/fewstep/__init__.py
FLOORS = {
    "errors": 0, "files": 0, "finite": 0, "locks": 0, "memory": 0, "rng": 0, "images": 0, "tables": 0, "version": 0,
    "nn": 1, "diffusion": 1, "notebook": 1, "charts": 1,
    "models": 2, "text": 2, "formats": 2,
    "weights": 3,
    "engines": 4, "safety": 4, "adapters": 4, "blockworld": 4, "cards": 4,
    "pipeline": 5, "data": 5, "metrics": 5,
    "train": 6, "export": 6, "serve": 6, "inspect": 6,
    "distill": 7, "evaluate": 7, "compare": 7, FACE: 7,
    "cli": 8,
    "__main__": 9,
}  # fmt: skip
FOR_ALL = {"errors", "files", "memory", "images"}  # which their own floor may import too

CORE_ROOMS = ("nn", "diffusion", "models", "text", "weights", "pipeline")
CORE_PACKAGES = {"torch", "numpy", "safetensors", "PIL", "tokenizers", "huggingface_hub", "typer", "rich"}
ORACLES = {"diffusers", "transformers"}
FILE_MODULES = {"pathlib", "os", "io", "shutil", "tempfile", "glob", "json", "zipfile", "pickle", "mmap"}
ONLY_PACKAGES = {"nn": {"torch"}, "diffusion": {"torch", "numpy"}, "models": {"torch"}}
KERNELS = {SRC / "engines" / "cuda" / name for name in ("kernels.py", "norms.py", "small_conv.py", "geglu.py")}
"""In Triton, whose functions take numbers and pointers one by one; the files are imported where they are needed."""
LITERARY_WORDS = {
    "told", "said", "asked", "kept", "means", "ways", "walk", "walks", "astray", "fooled", "pupil", "crew", "sift",
    "easel", "spelt", "versus", "tallied", "canvas",
}  # fmt: skip
OPTIONS_EXCEPTED = {"pipeline", "cli"}  # tasks and commands: their options are their interface
VAGUE_NAMES = {"util", "utils", "common", "base", "misc", "helper", "helpers"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room(path: Path) -> str:
    """The room a file belongs to: its folder, or for a file on the ground its own name."""
    parts = path.relative_to(SRC).parts
    if len(parts) > 1:
        return parts[0]
    return FACE if path.stem == "__init__" else path.stem


def place(path: Path, node: ast.AST | None = None) -> str:
    line = f":{node.lineno}" if node is not None and hasattr(node, "lineno") else ""
    return f"{path.relative_to(ROOT)}{line}"


def imported(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Every module that a file imports, anywhere in it, by its absolute name."""
    package = ("fewstep", *path.relative_to(SRC).parts[:-1])
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            if module == "fewstep":
                yield from ((f"fewstep.{alias.name}", node) for alias in node.names)
            else:
                yield module, node


def room_imported(module: str) -> str | None:
    """The room of fewstep that `module` belongs to; None for other packages."""
    first, *rest = module.split(".")
    if first != "fewstep":
        return None
    return rest[0] if rest and rest[0] in FLOORS else FACE


def functions(path: Path) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Every function of a file, and whether it is a method."""
    methods = {id(child) for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef) for child in node.body}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, id(node) in methods


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined]


def none(breaches: Iterable[str], advice: str) -> None:
    found = list(breaches)
    if found:
        pytest.fail("\n".join([*found, f"=> {advice}"]), pytrace=False)


def test_every_room_is_on_a_floor():
    none(
        sorted({f"src/fewstep/{room(path)} is not in the table" for path in FILES if room(path) not in FLOORS}),
        "put the room on a floor in FLOORS of this test and in CONTRIBUTING.md, or the file into a room",
    )


def test_rooms_import_from_lower_floors_only():
    breaches = []
    for path in FILES:
        here = room(path)
        for module, node in imported(path):
            there = room_imported(module)
            if there is None or there == here or there in FOR_ALL or here not in FLOORS:
                continue
            if FLOORS[there] >= FLOORS[here]:
                floors = f"floor {FLOORS[here]} from floor {FLOORS[there]}"
                breaches.append(f"{place(path, node)}: {here} imports {module}, {floors}")
    none(breaches, "pass the thing in as an argument, or move the shared file down a floor")


def test_mathematics_and_models_see_no_files_and_no_pictures():
    breaches = []
    for path in FILES:
        here = room(path)
        if here not in ONLY_PACKAGES:
            continue
        for module, node in imported(path):
            package = module.split(".")[0]
            foreign = package not in {"fewstep", *sys.stdlib_module_names, *ONLY_PACKAGES[here]}
            if foreign or package in FILE_MODULES or module.startswith("fewstep.images"):
                breaches.append(f"{place(path, node)}: {here} imports {module}")
        calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        opening = [node for node in calls if ast.unparse(node.func) in {"open", "torch.load", "torch.save"}]
        breaches += [f"{place(path, node)}: {here} calls {ast.unparse(node.func)}" for node in opening]
    none(breaches, "files belong in weights/, pictures in images.py; these rooms get tensors and mappings")


def test_outside_packages_are_core_or_imported_where_they_are_used():
    breaches = []
    for path in FILES:
        at_top = {id(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Import | ast.ImportFrom)}
        for function, _ in functions(path):
            at_top -= {id(node) for node in ast.walk(function)}
        allowed = {*CORE_PACKAGES, "triton"} if path in KERNELS else CORE_PACKAGES
        for module, node in imported(path):
            package = module.split(".")[0]
            if package in ORACLES:
                breaches.append(f"{place(path, node)}: imports {module}, which is an oracle for tests only")
            elif id(node) in at_top and package not in {"fewstep", *sys.stdlib_module_names, *allowed}:
                breaches.append(f"{place(path, node)}: imports {module} at the top of the file")
    none(breaches, "import an extra inside the one function that needs it, and never diffusers or transformers")


def test_rooms_hold_code_and_have_telling_names():
    breaches = [f"{place(path)}: {path.stem!r} says nothing" for path in FILES if path.stem in VAGUE_NAMES]
    for folder in sorted({path.parent for path in FILES} - {SRC}):
        own = [path for path in FILES if folder in path.parents]
        if folder.name in VAGUE_NAMES:
            breaches.append(f"{place(folder)}: {folder.name!r} says nothing")
        if not any(isinstance(node, ast.ClassDef | ast.FunctionDef) for path in own for node in ast.walk(tree(path))):
            breaches.append(f"{place(folder)} holds no code")
    none(breaches, "name a file after what is in it; a room appears when its first real code does")


def test_files_are_under_400_lines():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    none(
        (f"{place(path)}: {lines} lines" for path, lines in lengths.items() if lines >= 400),
        "split the file where two of its parts do not know each other",
    )


def test_functions_are_short():
    found = [(length(node), place(path, node), node.name) for path in FILES for node, _ in functions(path)]
    lengths = [lines for lines, _, _ in found]
    assert median(lengths) < 12, f"the median function has {median(lengths)} lines; the rule is under 12"
    over = sorted((entry for entry in found if entry[0] > 45), reverse=True)
    if len(over) > 0.05 * len(lengths):
        none(
            (f"{where}: {name} has {lines} lines" for lines, where, name in over),
            f"{len(over)} of {len(lengths)} functions are over 45 lines; at most 5 % may be: shorten them",
        )


def test_functions_take_at_most_7_parameters():
    breaches = []
    for path in FILES:
        for node, is_method in functions(path):
            arguments = node.args
            names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
            count = len(names) - (is_method and names[:1] in (["self"], ["cls"]))
            if path in KERNELS and node.decorator_list:
                continue
            if room(path) not in OPTIONS_EXCEPTED:
                count += len(arguments.kwonlyargs)
            if count > 7:
                breaches.append(f"{place(path, node)}: {node.name} takes {count} parameters")
    none(
        breaches,
        "gather those that travel together in a record (in pipeline and cli: make them keyword-only)",
    )


def undocumented(path: Path) -> Iterator[str]:
    if not ast.get_docstring(tree(path)):
        yield f"{place(path)}: the module has no docstring"
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    owners = [tree(path), *(n for n in tree(path).body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]
    for owner in owners:
        for node in owner.body:
            if not isinstance(node, definitions) or node.name.startswith("_") or node.name == "forward":
                continue
            decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
            if not decorators & {"overload", "setter", "override"} and not ast.get_docstring(node):
                yield f"{place(path, node)}: {node.name} has no docstring"


def test_every_public_name_has_a_docstring():
    none(
        (breach for path in FILES for breach in undocumented(path)),
        "say in one line what comes out, then what the signature cannot; forward is told by its class",
    )


def identifiers(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Every name that a file defines or uses: of functions, classes, parameters, attributes and variables."""
    for node in ast.walk(tree(path)):
        for field in ("name", "id", "attr", "arg", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value, node


def words(identifier: str) -> set[str]:
    """The parts of a name: `_kept_of`, `KeptOf` -> kept, of."""
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower().split("_"))


def test_words_of_an_identifier():
    assert words("_told_of") == {"", "told", "of"}
    assert words("WalkTask") == {"walk", "task"}
    assert words("SAID_ELSEWHERE") == {"said", "elsewhere"}
    assert not words("skeptical_canvases") & LITERARY_WORDS


def test_identifiers_are_the_fields_terms():
    breaches = {
        f"{place(path, node)}: {name}"
        for path in FILES
        for name, node in identifiers(path)
        if words(name) & LITERARY_WORDS
    }
    none(sorted(breaches), "take the term that the field uses for the thing")


def test_public_classes_have_names_of_their_own():
    places = defaultdict(list)
    for path in FILES:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(place(path, node))
    shared = {name: where for name, where in places.items() if len(where) > 1}
    none((f"{name}: {', '.join(where)}" for name, where in shared.items()), "rename all but one of them")


def test_loading_is_strict():
    breaches = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) in {"zip", "map"}:
                continue
            if any(ast.unparse(keyword) == "strict=False" for keyword in node.keywords):
                breaches.append(f"{place(path, node)}: {ast.unparse(node.func)}(..., strict=False)")
    none(breaches, "report missing and unexpected keys together as a CheckpointError")


def statements(path: Path) -> int:
    """Statements other than imports, definitions and docstrings: line width cannot game them."""
    left_out = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    nodes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.stmt) and not isinstance(node, left_out)]
    return sum(not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)) for n in nodes)


def test_the_core_is_under_2150_statements():
    counts = dict.fromkeys(CORE_ROOMS, 0)
    for path in FILES:
        if room(path) in counts:
            counts[room(path)] += statements(path)
    total = sum(counts.values())
    print(f"the core has {total} statements: {counts}")
    assert total < 2150, f"the core has {total} statements, the rule is under 2,150: {counts}"


def modules_after(code: str, *arguments: str) -> set[str]:
    """The names in sys.modules of a fresh interpreter that ran `code`."""
    ending = "\nimport sys\nprint('\\nMODULES', *sys.modules)"
    command = [sys.executable, "-c", code + ending, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, f"{code!r} failed:\n{run.stdout}{run.stderr}"
    return set(run.stdout.rpartition("MODULES")[2].split())


START_UPS = {
    "import": ("import fewstep",),
    "--help": ("from fewstep.cli import main\nassert not main()", "--help"),
    "generate --help": ("from fewstep.cli import main\nassert not main()", "generate", "--help"),
}


@pytest.mark.parametrize("start", START_UPS)
def test_start_up_is_light(start):
    heavy = {"torch", "numpy", "PIL", "tokenizers", "safetensors", "huggingface_hub", *ORACLES}
    loaded = heavy & modules_after(*START_UPS[start])
    assert not loaded, f"{sorted(loaded)} are imported at once; import them in the function that uses them"


def test_loading_needs_no_oracle():
    modules = modules_after("import fewstep\nfewstep.load(device='cpu')")
    own = sorted(name for name in modules if name.startswith("fewstep."))
    print(f"fewstep.load imports {len(own)} modules of fewstep: {', '.join(own)}")
    loaded = ORACLES & modules
    assert not loaded, f"fewstep.load() imports {sorted(loaded)}; they are oracles for tests only"
