"""The command line as a whole: quick to answer, one sentence on every mistake, exit code 2, no traceback."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pictures import folder

from vitrail import cli
from vitrail.weights import zoo

EXAMPLE = Path(__file__).parents[1] / "examples" / "my_recipe.py"


def typed(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vitrail", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said to a mistake: one line on standard error, nothing else, and 2."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.strip()


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        done = typed("--help")
        seconds.append(time.perf_counter() - begun)
        assert done.returncode == 0
    for verb in cli.VERBS:
        assert f"\n  {verb} " in done.stdout
    assert min(seconds) < 0.5


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], ["train!"]])
def test_what_answers_without_work_imports_no_torch(arguments: list[str]) -> None:
    code = f"import sys, vitrail.cli; vitrail.cli.main({arguments!r}); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "vitrail" in loaded
    assert not loaded & {"torch", "numpy", "PIL", "datasets", "tyro", "rich", "matplotlib"}


def test_import_vitrail_imports_no_torch_and_hands_on_its_names() -> None:
    code = (
        "import sys, vitrail; assert 'torch' not in sys.modules; "
        "print(*[getattr(vitrail, name).__name__ for name in vitrail.__all__])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["create", "engine", "fit", "load", "load_backbone", "read", "save"]


def test_python_m_vitrail_and_the_script_are_the_same() -> None:
    script = Path(sys.executable).with_name("vitrail")
    if not script.exists():
        pytest.skip("vitrail is not installed here")
    by_script = subprocess.run([str(script), "--version"], capture_output=True, text=True, check=True)
    assert by_script.stdout == typed("--version").stdout
    assert by_script.stdout.startswith("vitrail 0.")


def test_a_verb_that_is_none_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'train'" in refusal(capsys, "trian", "--data", "x")
    assert "'finetune'" in refusal(capsys, "fine-tune")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--rat", "1"], ["--rat ", "--rate"]),
        (["train", "--weight_decay=1"], ["--weight_decay ", "--weight-decay"]),
        (["train", "--data"], ["--data"]),
        (["train", "--steps", "many"], ["--steps 'many'", "whole number"]),
        (["train", "--rate", "fast"], ["--rate 'fast'", "number"]),
        (["train", "--crop", "random"], ["'random'", "--crop", "inception"]),
        (["train", "--betas", "0.9"], ["--betas", "2"]),
        (["train", "--balance", "yes"], ["yes"]),
        (["train", "photos"], ["nothing takes photos", "leave it out", "--help"]),
        (["train"], ["--data"]),
        (["run"], ["Python file", "recipe"]),
        (["run", "missing.py"], ["missing.py"]),
        (["predict"], ["vitrail predict", "missing"]),
        (["predict", "model", "--topp", "3"], ["--topp", "--top"]),
        (["evaluate", "model"], ["--data", "missing"]),
        (["models", "--resolutoin", "3"], ["--resolution"]),
        (["models", "--resolution", "0"], ["--resolution"]),
        (["bench"], ["bench data"]),
        (["bench", "data", "--date", "x"], ["--date", "--data"]),
    ],
    ids=" ".join,
)
def test_a_mistake_is_answered_in_one_sentence(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = refusal(capsys, *arguments)
    assert [word for word in words if word not in said] == [], said
    assert not set("│╭╮╰╯") & set(said)


def test_a_mistake_has_no_traceback_and_exit_code_2(tmp_path: Path) -> None:
    done = typed("train", "--data", "no-such-folder", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no-such-folder does not exist" in done.stderr
    assert list(tmp_path.iterdir()) == [] or not any(tmp_path.rglob("config.json"))


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["train", "--model", "ViT-Ti/16"], "16 x 16 or 32 x 32"),
        (["finetune", "--weights", "vitrail:ViT-Micro/7"], "28 x 28 or 35 x 35"),
        (["pretrain", "--model", "ViT-Ti/16"], "16 x 16 or 32 x 32"),
    ],
    ids=["train", "finetune", "pretrain"],
)
def test_a_size_that_patches_do_not_divide(
    arguments: list[str], nearest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path / "data", classes=2, each=6)
    assert cli.main([*arguments, "--data", str(data), "--size", "30", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("--size: a picture of 30 x 30 pixels")
    assert said.endswith(f"the nearest sizes that do are {nearest}.\n")


def test_an_unknown_model_is_not_taken_for_a_wrong_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path / "data", classes=2, each=6)
    assert cli.main(["train", "--data", str(data), "--model", "ViT-Q/16", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("there is no model named 'ViT-Q/16'")


@pytest.mark.skipif(os.name != "posix", reason="pipes close differently elsewhere")
def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m vitrail models --json | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "[\n"
    assert done.stderr == ""


@pytest.mark.parametrize("verb", sorted(set(cli.VERBS) - {"bench"}))
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    first = [str(EXAMPLE)] if verb == "run" else []
    with pytest.raises(SystemExit) as end:
        cli.main([verb, *first, "--help"])
    assert end.value.code in (0, None)
    assert f"usage: vitrail {verb}" in capsys.readouterr().out


def test_the_models_as_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in zoo.NAMES)
    line = next(line for line in out.splitlines() if "ViT-B/16" in line)
    # 86,567,656 of the paper's ViT-B/16 are these and a head of 1,000 classes: 768 x 1000 + 1000.
    assert {"768", "12", "3072", "197", f"{86_567_656 - 769_000:,}"} <= set(line.split())


@pytest.mark.parametrize("asked", [225, 384])
def test_the_table_names_the_resolution_that_its_numbers_are_of(
    asked: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["models", "--resolution", str(asked)]) == 0
    title, *lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    by_name = {line.split()[0]: line.split() for line in lines}
    if asked == 225:  # 224 for all
        assert " at 224 pixels" in title
        assert "pixels" not in by_name["name"]
        return
    assert " at about 384 pixels" in title
    place = by_name["name"].index("pixels")
    assert (by_name["ViT-H/14"][place], by_name["ViT-L/16"][place]) == ("378", "384")


def test_the_models_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json", "--resolution", "384"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert tuple(rows) == zoo.NAMES
    large = rows["ViT-L/16"]
    assert (large["resolution"], large["tokens"], large["width"], large["depth"]) == (384, 24 * 24 + 1, 1024, 24)
    assert large["parameters"] == zoo.config("ViT-L/16", (384, 384)).parameters()
    tokens, width = 577, 1024
    each = 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * tokens * width**2
    assert large["macs"] == 24 * each + 576 * 3 * 16 * 16 * width
