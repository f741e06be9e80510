"""The tour: its commands are commands, both languages tell the same, its notebook runs."""

import contextlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import get_type_hints

import pytest
from PIL import Image
from processes import Nursery

from vitrail.cli import VERBS, main
from vitrail.commands.flags import parse

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ENGLISH, CHINESE = ((DOCS / name).read_text(encoding="utf-8") for name in ("tour.md", "tour.zh-CN.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"!\[[^\]]+\]\(([^)]+)\)")
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)#]+)\)")
COMMANDS = [line for language, body in BLOCK.findall(ENGLISH) if language == "sh" for line in body.splitlines()]
# What ends within seconds on one thread, run as it stands; it needs no weights but the packaged ones.
QUICK = ("models", "recipe", "recipes", "predict", "explain")


def test_both_languages_have_the_same_commands_outputs_and_pictures() -> None:
    assert BLOCK.findall(CHINESE) == BLOCK.findall(ENGLISH)
    assert PICTURE.findall(CHINESE) == PICTURE.findall(ENGLISH)
    assert [line.count("#") for line in sections(CHINESE)] == [line.count("#") for line in sections(ENGLISH)]
    numbers = re.compile(r"\d+\.\d+")
    for here, there in zip(sections(CHINESE), sections(ENGLISH), strict=True):
        assert numbers.findall(here)[:1] == numbers.findall(there)[:1], (here, there)
    # Each measured number of one is in the other: percentages, and numbers with a thousand's comma.
    told = re.compile(r"\d[\d,.]* %|\d+,\d{3}(?:,\d{3})*")
    assert set(told.findall(prose(CHINESE))) == set(told.findall(prose(ENGLISH)))


def sections(text: str) -> list[str]:
    return re.findall(r"^#+ .*$", text, re.MULTILINE)


def prose(text: str) -> str:
    return BLOCK.sub("", text)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_pictures_and_links_lead_somewhere(text: str) -> None:
    for target in PICTURE.findall(text) + [link for link in LINK.findall(text) if "://" not in link]:
        assert (DOCS / target).exists(), target
    for target in PICTURE.findall(text):
        assert (DOCS / target).stat().st_size <= 200 * 1024, target
    with Image.open(DOCS / "pictures/tour/cat.jpg") as picture:
        assert picture.size == (450, 300)


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_has_a_verb_and_flags_that_are_there(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *words = shlex.split(line)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert program == "vitrail"
    verb, rest = words[0], words[1:]
    module, name = VERBS[verb][0].split(":")
    function = getattr(__import__(module, fromlist=[name]), name)
    kind = next(iter(get_type_hints(function).values()))
    if kind != list[str]:
        parse(kind, rest, verb)  # raises UserError for a flag or value that is none
        return
    monkeypatch.setenv("COLUMNS", "100")
    with contextlib.suppress(SystemExit):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    for flag in [word for word in rest if word.startswith("--")]:
        assert flag in shown, flag


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.split()[1] in QUICK])
def test_quick_commands_run_and_say_what_the_tour_says(line: str, tmp_path: Path) -> None:
    words = shlex.split(line.replace("dinov2s.pt", "vitrail:ViT-Micro/7").replace("--size 224", "--size 28"))
    words = [str(ROOT / word) if word.startswith("docs/") else word for word in words[1:]]
    code, said, error = Nursery(tmp_path).run(*words, first="import os; os.environ['COLUMNS'] = '100'")
    assert code == 0, error
    if words[0] in ("recipe", "models") and "finetune" not in line:
        outputs = [body for language, body in BLOCK.findall(ENGLISH.split(line)[1]) if language == "text"]
        for row in outputs[0].splitlines():
            assert row.split() in [shown.split() for shown in said.splitlines()], row


def test_the_notebook_runs() -> None:
    """In a kernel of its own; its cells hold their own assertions."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "examples")}}
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    environment.pop("VITRAIL_TOUR_WEIGHTS", None)
    client.execute(env=environment)
    said = json.dumps([cell.get("outputs", []) for cell in notebook.cells if cell.cell_type == "code"])
    assert "sums of whole numbers 0.0" in said
    assert said.count("image/png") == 5
