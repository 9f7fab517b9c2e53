"""What lies beside the code: links of the texts, the pages of the site, pinned versions, kept results."""

from __future__ import annotations

import ast
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
TEXTS = [name for name in FILES if name.endswith(".md")]
FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^)\s>]+)")
LARGEST = 500_000
"""Bytes of a file, at most."""


def anchors(text: str) -> set[str]:
    """The anchors that the headings of a page have, on GitHub and on the site."""
    headings = re.findall(r"^#+ +(.+?) *#*$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(folder: Path, text: str) -> list[str]:
    """The relative links of a page in `folder` that lead to no file, or to no heading of one."""
    broken = []
    for link in LINK.findall(FENCED.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = folder / name if name else None
        page = text if target is None else target.read_text() if target.suffix == ".md" and target.is_file() else ""
        if (target is not None and not target.exists()) or (anchor and anchor not in anchors(page)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    assert broken_links(path.parent, path.read_text()) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A `heading`, with words\n")
    good = (
        "[a](there.md) [b](there.md#a-heading-with-words) [c](#here) [d](https://x.y/z)\n## Here\n```\n[e](no)\n```\n"
    )
    assert broken_links(tmp_path, good) == []
    bad = "[a](gone.md) ![b](gone.png) [c](there.md#gone) [d](#gone)"
    assert broken_links(tmp_path, bad) == ["gone.md", "gone.png", "there.md#gone", "#gone"]


def test_every_page_is_on_the_site() -> None:
    pages = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(pages) == sorted(name for name in TEXTS if "/" not in name or name.startswith("docs/"))


def required() -> set[str]:
    """The distributions that setup.py names, those of the extra `dev` too."""
    wanted = {"install_requires", "extras_require"}
    values = [
        ast.literal_eval(keyword.value)
        for keyword in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(keyword, ast.keyword) and keyword.arg in wanted
    ]
    items = [item for value in values for item in (value if isinstance(value, list) else sum(value.values(), []))]
    return {re.split(r"[^\w.-]", item)[0] for item in items}


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_required_package_is_pinned() -> None:
    assert required() - set(pinned()) == set()


@pytest.mark.parametrize("name", ["pydantic", "psutil", "pyarrow", "huggingface_hub"])
def test_pins_are_what_was_tried(name: str) -> None:
    assert pinned()[name] == version(name)


def test_results_are_figures_tables_and_pictures() -> None:
    kinds = {Path(name).suffix for name in FILES if name.startswith("benchmarks/results/")}
    assert kinds <= {".json", ".jsonl", ".md", ".png"}


def test_nothing_large_or_built_is_kept() -> None:
    there = [ROOT / name for name in FILES if (ROOT / name).is_file()]
    assert [path.name for path in there if path.stat().st_size > LARGEST or path.suffix in (".whl", ".pyc")] == []
    built = ["a.whl", "dist/a", "build/site/index.html"]
    ignored = subprocess.run(["git", "check-ignore", "--no-index", *built], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout.split() == built
