"""The manners of the house that no other tool holds (import-linter has the chain of rooms)."""

import ast
import builtins
import dis
import importlib
import re
import subprocess
import types
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "src" / "vitrail"
MODULES = sorted(HOUSE.rglob("*.py"))
LONGEST = 380
SHELVES = ("src", "tests", "docs", "examples", "scripts", "bench")
SUFFIXES = {".py", ".md", ".toml", ".json", ".html"}

# Written apart, so that this file does not hold them itself.
UNWANTED = {
    "a note to finish later": "TO" + "DO|FIX" + "ME",
    "a part that is not there": "raise NotImpl" + "ementedError",
    "a future import": "from __" + "future__",
    "a package index's host": r"py" + r"pi\.org|files\.python" + r"hosted",
    "where it was written": r"(?<![\w.])/wo" + r"rk/|\bsand" + r"box\b",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def texts() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "Makefile", ROOT / "pyproject.toml"]
    for shelf in SHELVES:
        found += [path for path in (ROOT / shelf).rglob("*") if path.suffix in SUFFIXES]
    return [path for path in found if not any(part.endswith(("egg-info", "_cache")) for part in path.parts)]


def imported(tree: ast.AST) -> set[str]:
    """Every dotted name that is imported, or reached through the name of an imported package."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("torch.distributed", {"core/ranks.py"}),
        ("matplotlib", {f"analysis/figures{each}.py" for each in ("", "_inside", "_robustness", "_speed")}),
    ],
)
def test_few_files_speak_to(package: str, homes: set[str]) -> None:
    speakers = {
        path.relative_to(HOUSE).as_posix()
        for path in MODULES
        if any(word == package or word.startswith(f"{package}.") for word in imported(ast.parse(path.read_text())))
    }
    assert speakers == homes


def test_a_file_is_read_in_one_sitting() -> None:
    lengths = {name(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}


def test_packages_are_empty_save_the_top_one() -> None:
    packages = {path for path in MODULES if path.name == "__init__.py"}
    assert {path.parent for path in MODULES} == {path.parent for path in packages}
    assert [name(path) for path in packages if path.read_text() and path.parent != HOUSE] == []


def test_each_file_opens_by_saying_what_it_is() -> None:
    silent = [name(path) for path in MODULES if path.read_text() and not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_no_drawer_for_odds_and_ends() -> None:
    odd = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert [name(path) for path in HOUSE.rglob("*") if path.stem in odd] == []


def test_nothing_says_what_should_not_be_said() -> None:
    found = {
        f"{name(path)}: {what}"
        for path in texts()
        for what, pattern in UNWANTED.items()
        if re.search(pattern, path.read_text(encoding="utf-8", errors="replace"))
    }
    assert found == set()


def mapped() -> Counter[str]:
    """The files of the tree in docs/map.md; a line without a description of three words counts as none."""
    (tree,) = re.findall(
        r"^```\nsrc/vitrail/\n(.*?)^```$", (ROOT / "docs/map.md").read_text(), re.DOTALL | re.MULTILINE
    )
    found: Counter[str] = Counter()
    folders: list[str] = []
    for line in tree.splitlines():
        match = re.fullmatch(r"((?:  )+)(\S+)(?:\s+(.*))?", line)
        assert match, f"docs/map.md: {line!r}"
        depth = len(match[1]) // 2 - 1
        del folders[depth:]
        if match[2].endswith("/"):
            folders.append(match[2].rstrip("/"))
        else:
            assert len((match[3] or "").split()) >= 3, f"docs/map.md says nothing of {match[2]}"
            found["/".join([*folders, match[2]])] += 1
    return found


def committed() -> list[Path]:
    """The files that git knows, so that a half-made one need not stand in the map; all of them where git knows none."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=HOUSE, capture_output=True, text=True, check=False).stdout
    return [HOUSE / path for path in listed.split("\0") if path] or [p for p in HOUSE.rglob("*") if p.is_file()]


def test_the_map_has_every_file_once() -> None:
    found = mapped()
    assert [path for path, count in found.items() if count > 1] == []
    assert [path for path in found if not (HOUSE / path).is_file()] == []
    there = [path for path in committed() if path.is_file() and path.suffix != ".pyc"]
    there = [path for path in there if path.name != "__init__.py" or path.stat().st_size]
    assert [name(path) for path in there if path.relative_to(HOUSE).as_posix() not in found] == []


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__main__.py"], ids=name)
def test_every_global_name_is_defined(path: Path) -> None:
    """The linter and the type checker cannot say: to both, shapes in annotations look like undefined names."""
    module = importlib.import_module(".".join(path.relative_to(ROOT / "src").with_suffix("").parts))
    known = {*vars(module), *dir(builtins)}
    waiting, missing = [compile(path.read_text(encoding="utf-8"), str(path), "exec")], set()
    while waiting:
        code = waiting.pop()
        waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        steps = () if code.co_name == "<module>" else dis.get_instructions(code)
        missing |= {step.argval for step in steps if step.opname == "LOAD_GLOBAL"} - known
    assert missing == set()
