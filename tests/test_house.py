"""The house holds together: who imports whom, what code may not do, how it is packaged."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.tree import PAGE, with_tree

ROOT = Path(__file__).parents[1]
LIBRARY = sorted([*(ROOT / "ds_stacking").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
LAUNCHERS = sorted((ROOT / "launchers").rglob("*.py"))
OTHERS = sorted(path for folder in ("benchmarks", "examples", "tests") for path in (ROOT / folder).rglob("*.py"))

ARROWS = {
    "common": set(),
    "config": set(),
    "command_line": {"config", "launcher_options"},
    "launcher_options": set(),
    "kernels": set(),
    "growth": {"config"},
    "models": {"config", "kernels", "growth"},
    "engine": {"config", "growth", "models"},
    "checkpoint": {"config", "growth"},
    "data": {"config"},
    "reports": {"config"},
    "planning": {"config", "models"},
    "training": {"planning", "config", "growth", "models", "engine", "checkpoint", "data", "reports"},
    "studies": {
        *{"command_line", "config", "launcher_options", "reports", "training"},
        *{"data", "engine", "growth", "models"},
    },
}
"""Rooms of the library and the rooms that each may import, beside `common`, which all but the kernels may."""
PACKAGES = {
    "common": {"pydantic", "typing_extensions", "numpy", "torch"},  # the last two: the generators are theirs
    "config": set(),
    "kernels": {"torch", "triton"},
    "growth": {"torch"},
}
"""Rooms that must do with these packages beside the standard library."""
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
}
WRITERS = {
    "ds_stacking/common/files.py": "it is what the others use",
    "ds_stacking/checkpoint/durable.py": "into a directory that is renamed when it is whole",
    "ds_stacking/checkpoint/huggingface.py": "into a directory that is renamed when it is whole",
    "ds_stacking/checkpoint/offline.py": "into a directory that is renamed when it is whole",
    "ds_stacking/common/failures.py": "failures, a line from each rank, for the batch script",
    "ds_stacking/training/export.py": "into a directory that is renamed when it is whole",
    "ds_stacking/models/shards.py": "into a directory that is renamed when it is whole",
    "ds_stacking/data/preparation/shards.py": "into a directory that is renamed when it is whole",
    "kernels/offline.py": "a table of the repository, which git keeps",
    "kernels/report.py": "a page of the repository, which git keeps",
    "ds_stacking/training/metrics_file.py": "metrics.jsonl, which grows line by line",
}
"""Files that may open others for writing, and why; all else is written by common/files.py."""
PICKLING_COLLECTIVES = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    """The room of a library file; a file directly in ds_stacking is one by itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def imports(source: str) -> Iterator[str]:
    """Dotted names of all modules that a source imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_imports(where: str, source: str) -> list[str]:
    """Imports that a file of the room `where` may not make."""
    wrong = []
    for name in imports(source):
        top, *rest = name.split(".")
        if top == "ds_stacking":
            fine = rest[0] in {where, *ARROWS[where]} or (rest[0] == "common" and where != "kernels")
        elif top == "deepspeed":
            fine = where == "engine"
        else:
            fine = top in sys.stdlib_module_names or where not in PACKAGES or top in PACKAGES[where]
        if not fine:
            wrong.append(name)
    return wrong


def dangers(source: str) -> list[str]:
    """What in a source runs foreign code, or can: pickle in any form, eval, shells, code beside model weights."""
    found = [name for name in imports(source) if name.split(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name.split(".")[-1] in PICKLING_COLLECTIVES:
                found.append(name)
            for keyword in node.keywords:
                unsafe = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                if keyword.arg in ("trust_remote_code", "shell", "allow_pickle") and unsafe:
                    found.append(ast.unparse(keyword))
    return found


def writes_in_place(source: str) -> list[str]:
    """Calls after which, cut short, half a file stands under its final name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        method = name.split(".")[-1]
        texts = [*node.args, *(keyword.value for keyword in node.keywords)]
        modes = [n.value for n in texts if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        opens = method in ("open", "fdopen") and any(re.fullmatch("[wax]b?[+]?t?", mode) for mode in modes)
        by_name = method in ("savefig", "ZipFile") and ast.unparse(node.args[0]) != "file"
        if opens or by_name or name == "json.dump" or method in ("write_text", "write_bytes") and name != "write_text":
            found.append(name)
    return found


def test_the_plan_names_every_room() -> None:
    assert {room(path) for path in LIBRARY} <= {*ARROWS, "__init__"}


@pytest.mark.parametrize("path", [path for path in LIBRARY if room(path) != "__init__"], ids=relative)
def test_imports_follow_the_arrows(path: Path) -> None:
    assert wrong_imports(room(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("growth", "import deepspeed"),
        ("growth", "import numpy"),
        ("growth", "def f():\n    from ds_stacking.models.bert import Bert"),
        ("training", "from deepspeed.runtime.engine import DeepSpeedEngine"),
        ("kernels", "from ds_stacking.config import RunConfig"),
        ("models", "from ds_stacking import engine"),
        ("config", "import torch"),
        ("data", "import ds_stacking.models.bert"),
        ("common", "from ds_stacking.config import RunConfig"),
        ("kernels", "from ds_stacking.common.files import write_json"),
    ],
)
def test_a_wrong_import_is_found(where: str, source: str) -> None:
    assert len(wrong_imports(where, source)) == 1


def graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """For each module, by its dotted name, the others that its source imports, for type checkers or in functions."""
    found = {}
    for module, source in sources.items():
        paths = [name.split(".") for name in imports(source)]
        prefixes = [[".".join(parts[:end]) for end in range(len(parts), 0, -1)] for parts in paths]
        found[module] = {next((name for name in names if name in sources), module) for names in prefixes} - {module}
    return found


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others: strongly connected components of two or more."""

    def reached(start: str) -> set[str]:
        seen, rest = set(), [start]
        while rest:
            for name in edges[rest.pop()] - seen:
                seen.add(name)
                rest.append(name)
        return seen

    reach = {name: reached(name) for name in edges}
    whole = {frozenset({other for other in reach[name] if name in reach[other]}) for name in edges}
    return sorted(sorted(component) for component in whole if component)


def library() -> dict[str, str]:
    """The source of every module of the library."""
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in LIBRARY}
    named = {path: ("ds_stacking", *name) if name[0] == "kernels" else name for path, name in parts.items()}
    return {".".join(name).removesuffix(".__init__"): path.read_text() for path, name in named.items()}


def test_no_modules_import_each_other_in_a_circle() -> None:
    edges = graph(library())
    assert len(edges) == len(LIBRARY) and sum(map(len, edges.values())) > len(edges), "imports were not found"
    assert circles(edges) == []


@pytest.mark.parametrize("hidden", ["{}", "if TYPE_CHECKING:\n    {}", "def f():\n    {}"])
def test_a_circle_is_found(hidden: str) -> None:
    """Through two others, under TYPE_CHECKING and inside a function too."""
    back = hidden.format("from ds_stacking.training.loop import Pretraining")
    sources = library()
    sources["ds_stacking.training.schedule"] += f"\n{back}\n"
    (circle,) = circles(graph(sources))
    assert {"ds_stacking.training.loop", "ds_stacking.training.schedule"} <= set(circle)


@pytest.mark.parametrize("path", [*LIBRARY, *LAUNCHERS], ids=relative)
def test_no_code_runs_foreign_code(path: Path) -> None:
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.save(x, path)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
        "numpy.load(path, allow_pickle=True)",
        "dist.broadcast_object_list(items)",
        "dist.all_gather_object(a, b)",
    ],
)
def test_a_danger_is_found(source: str) -> None:
    assert len(dangers(source)) == 1


@pytest.mark.parametrize("path", [*LIBRARY, *LAUNCHERS], ids=relative)
def test_every_file_is_whole_or_absent(path: Path) -> None:
    assert bool(writes_in_place(path.read_text())) == (relative(path) in WRITERS)


@pytest.mark.parametrize(
    "source",
    [
        "json.dump(content, file)",
        "path.write_text(text)",
        "(folder / name).write_bytes(b'')",
        "open(path, 'w')",
        "path.open('a', encoding='utf-8')",
        "path.open(mode='xb')",
        "zipfile.ZipFile(path, 'w')",
        "figure.savefig(path)",
    ],
)
def test_a_write_in_place_is_found(source: str) -> None:
    assert len(writes_in_place(source)) == 1


def test_reading_is_no_write() -> None:
    assert writes_in_place("path.open('rb')\nopen(path)\nwrite_text(path, text)\nfigure.savefig(file)") == []


def test_model_eval_is_no_danger() -> None:
    assert dangers("model.eval()\nAutoTokenizer.from_pretrained(x, trust_remote_code=False)") == []


@pytest.mark.parametrize("path", [*LIBRARY, *LAUNCHERS, *OTHERS, ROOT / "setup.py"], ids=relative)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", LAUNCHERS, ids=relative)
def test_launchers_are_thin_and_show_their_command(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 100
    assert f"launchers/{path.name}" in (ast.get_docstring(ast.parse(text)) or "")


def private_names(source: str) -> list[str]:
    """Names of the library with an underscore before them that a test imports, or replaces by setattr or patch."""
    found = [name for name in imports(source) if name.startswith("ds_stacking.") and re.search(r"\._[a-z]", name)]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("setattr", "replaced", "patch"):
            texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            found += [text for text in texts if isinstance(text, str) and re.search(r"(^|\.)_[a-z]", text)]
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=relative)
def test_tests_leave_private_names_alone(path: Path) -> None:
    """The kernels' parts apart, which tests run one by one."""
    kernels = "ds_stacking.kernels._"
    found = [name for name in private_names(path.read_text()) if not name.startswith(kernels)]
    assert found == []


def test_private_names_are_found() -> None:
    source = (
        "from ds_stacking.growth.plan import _made\nmonkeypatch.setattr(plan, '_made', 3)\nimport ds_stacking.a._b"
    )
    assert len(private_names(source)) == 3 and private_names("setattr(plan, 'made', '__x__')") == []


def code_lines(source: str) -> list[str]:
    """The lines of a source that do something: no imports, signatures, docstrings, comments, brackets alone."""
    lines, tree = source.splitlines(), ast.parse(source)
    left_out: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            left_out |= set(range(node.lineno, node.body[0].lineno))
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Import | ast.ImportFrom) or text:
            left_out |= set(range(node.lineno, node.end_lineno + 1))
    found = (line.strip() for number, line in enumerate(lines, 1) if number not in left_out)
    return [line for line in found if re.search(r"\w", line) and not line.startswith("#")]


def twice(sources: Iterable[list[str]], length: int = 6) -> list[tuple[str, ...]]:
    """Stretches of so many lines that stand in more than one place."""
    stretches = Counter(tuple(lines[at : at + length]) for lines in sources for at in range(len(lines) - length + 1))
    return [stretch for stretch, count in stretches.items() if count > 1]


def test_no_six_lines_stand_twice() -> None:
    """Triton's kernels apart, whose openings are alike: each is compiled by itself."""
    assert twice(code_lines(path.read_text()) for path in LIBRARY if room(path) != "kernels") == []


def test_lines_that_stand_twice_are_found() -> None:
    first = code_lines('def f(a):\n    """Say."""\n    a = 1  # one\n    # more\n    b = 2\n    c = 3\n')
    second = code_lines("import os\nx = 0\na = 1  # one\nb = 2\nc = 3\n")
    assert twice([first, second], 3) == [("a = 1  # one", "b = 2", "c = 3")] and twice([first, second], 4) == []


def test_the_page_shows_every_file() -> None:
    page = PAGE.read_text()
    assert page == with_tree(page), "run python -m tests.tree"


def test_imported_packages_are_declared() -> None:
    (required,) = (
        {re.split(r"[^\w.-]", item)[0] for item in ast.literal_eval(keyword.value)}
        for keyword in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(keyword, ast.keyword) and keyword.arg == "install_requires"
    )
    declared = {re.sub(r"[-_.]+", "-", name).lower() for name in required}
    distributions = packages_distributions()
    used = {name.split(".")[0] for path in LIBRARY for name in imports(path.read_text())}
    for package in sorted(used - sys.stdlib_module_names - {"ds_stacking"}):
        names = {re.sub(r"[-_.]+", "-", name).lower() for name in distributions[package]}
        assert names & declared, f"{package} is imported, but setup.py does not require it"


def python(code: str, folder: Path) -> str:
    """What `code` prints in a process of its own that starts in `folder`."""
    command = [sys.executable, "-I", "-c", code]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_installed_project_hides_no_package_named_kernels(tmp_path: Path) -> None:
    """A distribution named kernels exists, and transformers imports it."""
    found = python("import importlib.util as u; print(getattr(u.find_spec('kernels'), 'origin', None))", tmp_path)
    assert not found.startswith(str(ROOT / "kernels"))


def test_the_wheel_works_elsewhere(tmp_path: Path) -> None:
    source, installed = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("ds_stacking", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ds_stacking"}
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {
        relative(path) if room(path) != "kernels" else f"ds_stacking/{relative(path)}" for path in LIBRARY
    }
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); "
        "import ds_stacking.command_line as c, ds_stacking.kernels as k; print(c.__file__, k.__file__)"
    )
    for file in python(code, tmp_path).split():
        assert file.startswith(str(installed))


def test_one_list_of_what_forked_ranks_have_imported() -> None:
    found = [path.name for path in (ROOT / "tests").rglob("*.py") if "context.set_fork" + "server" in path.read_text()]
    assert found == ["ranks.py"], "the last list given holds for all ranks of a process"
