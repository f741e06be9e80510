"""What a machine may lack, a compiler, a package, git: said before a run begins, so that the next command is not refused."""

import shlex
import sys
from pathlib import Path

import pytest
import torch
from pictures import folder
from processes import Nursery

from vitrail import cli
from vitrail.experiments.costs import commit

SMALL = shlex.split("--data data --model ViT-Nano/8 --size 16 --steps 1 --batch 8 --workers 0 --out run")
Say = pytest.CaptureFixture[str]
FAILURE = "No working C++ compiler found\nin here\n\nSet TORCH_LOGS"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder(tmp_path / "data", classes=2, each=6)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_compiler(here: Path) -> None:
    bare = f"import os; os.environ.update(PATH='', TORCHINDUCTOR_CACHE_DIR={str(here / 'cache')!r}); "
    code, out, error = Nursery(here).run("train", *SMALL, "--compile", first=bare + "os.environ.pop('CXX', None)")
    assert code == 2, error
    assert error.count("\n") == 1, error
    assert error.startswith("--compile: torch.compile does not work here (")
    assert "C++ compiler" in error
    assert error.endswith("or leave --compile out.\n")
    assert out == ""
    assert not (here / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("predict vitrail:ViT-Micro/7 data --engine compile", "--engine compile"),
        ("bench training --model ViT-Nano/8 --size 16 --batch 2 --seconds 0.1 --no-peaks --compiled", "--compiled"),
    ],
)
def test_an_engine_without_a_compiler(
    here: Path, capsys: Say, monkeypatch: pytest.MonkeyPatch, command: str, flag: str
) -> None:
    def fails(*given: object, **named: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException(FAILURE)

    at_once = command.startswith("bench")
    monkeypatch.setattr(torch, "compile", fails if at_once else lambda *given, **named: fails)
    assert cli.main(shlex.split(command)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"{flag}: torch.compile does not work here (No working C++ compiler found in here);")
    assert said.endswith(f"or leave {flag} out.")


def test_what_cannot_be_compiled_once_the_run_has_begun(
    here: Path, capsys: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException(FAILURE)

    monkeypatch.setattr("vitrail.experiments.run.try_to_compile", lambda device: None)
    monkeypatch.setattr(torch, "compile", fails)
    assert cli.main(["train", *SMALL, "--compile"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "(No working C++ compiler found in here)" in said
    assert said.endswith("or leave --compile out, in a new run (another --out).")
    assert (here / "run" / "config.json").exists()


def test_no_wandb(here: Path, capsys: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.main(["train", *SMALL, "--wandb"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'vitrail[track]'" in said
    assert "--no-wandb" in said
    assert cli.main(["train", *SMALL, "--no-wandb"]) == 0


def test_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = tmp_path / "src" / "vitrail" / "experiments"
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr("vitrail.experiments.costs.__file__", str(sources / "costs.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
