"""Every relative link and image of every Markdown file leads to a file of the repository, and to a heading in it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from tests.house.test_papers import ROOT, fail_if, repository, text

CODE = re.compile(r"^(```|~~~).*?^\1[^\n]*$|`[^`\n]+`", flags=re.MULTILINE | re.DOTALL)
LINKS = (
    re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)"),  # [text](target "title"), ![text](target)
    re.compile(r"^\s{0,3}\[[^\]^]+\]:\s+<?([^\s>]+)", flags=re.MULTILINE),  # [name]: target
    re.compile(r"""<(?:a|img|source|video)\b[^>]*?\b(?:href|src|srcset)=["']([^"'\s]+)""", flags=re.IGNORECASE),
)


def links(page: str) -> list[str]:
    """The targets of a page's links and images within the repository, in code excepted."""
    prose = CODE.sub("", page)
    targets = [target for pattern in LINKS for target in pattern.findall(prose)]
    return [target for target in targets if not re.match(r"[A-Za-z][\w+.-]*:|//", target)]


def anchors(page: str) -> set[str]:
    """The fragments that GitHub gives the headings of a page; further headings of one name are numbered."""
    found: set[str] = set(re.findall(r"""\b(?:id|name)=["']([^"']+)""", page))
    without_code = re.sub(r"^(```|~~~).*?^\1[^\n]*$", "", page, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", without_code, flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = sum(bool(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", each)) for each in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


@cache
def tracked() -> frozenset[Path]:
    """The files of the repository and the folders that they are in."""
    files = repository()
    return frozenset({*files, *(folder for file in files for folder in file.parents if folder.is_relative_to(ROOT))})


def breach(path: Path, target: str) -> str | None:
    """What is wrong with a link from the page at `path`; None for nothing."""
    name, _, fragment = unquote(target).partition("#")
    base = ROOT if name.startswith("/") else path.parent
    file = (base / name.lstrip("/")).resolve() if name else path
    if file not in tracked():
        return "leads to no file of the repository"
    if fragment and file.suffix == ".md" and fragment.lower() not in anchors(text(file)):
        return f"names no heading of {file.relative_to(ROOT).as_posix()}"
    return None


def test_links_and_images_lead_somewhere() -> None:
    pages = [path for path in repository() if path.suffix == ".md"]
    found = [(path, target, breach(path, target)) for path in pages for target in links(text(path))]
    fail_if(
        [f"{path.relative_to(ROOT)}: {target} {wrong}" for path, target, wrong in found if wrong],
        "write the file or the heading, or take out the link",
    )


def test_what_is_a_link() -> None:
    page = """[a](b.md "title") ![c](d.png) [e](<f.md>) [g]: not-a-link
[h]: i.md
<img width="3" src="j.png"> <a href='k.md#l'>m</a> [n](https://example.com) `[o](p.md)`
```
[q](r.md)
```
[s](#t)
"""
    assert sorted(links(page)) == ["#t", "b.md", "d.png", "f.md", "i.md", "j.png", "k.md#l"]


def test_what_a_heading_is_called() -> None:
    assert anchors("# The `house`: a plan!\n## Two\n## Two\n```\n# no\n```\n") == {"the-house-a-plan", "two", "two-1"}


def test_a_link_to_nothing_is_seen() -> None:
    page = ROOT / "README.md"
    assert breach(page, "CONTRIBUTING.md#add-a-sampler") is None
    assert breach(page, "docs") is None
    assert breach(page, "docs/nothing.md") == "leads to no file of the repository"
    assert breach(page, "CONTRIBUTING.md#add-a-moon") == "names no heading of CONTRIBUTING.md"
