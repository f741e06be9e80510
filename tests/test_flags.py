"""Every setting is one flat flag with a line of help and its default; TOML sets any of them; flags win."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from vitrail import cli
from vitrail.commands import bench_data, evaluate, models, predict
from vitrail.commands.flags import given, parse, read_toml
from vitrail.core.errors import UserError
from vitrail.experiments.recipe import FINETUNE, Recipe, flat, with_settings


def helped(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Flag -> its line of --help, default and all."""
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--help"])
    found: dict[str, str] = {}
    flag = ""
    for line in capsys.readouterr().out.splitlines():
        text = line.strip("│╭╮╰╯| ")
        if re.match(r"[│ ] (--[a-z]|-h, )", line):
            flag = re.split(r"[ ,]", text.removeprefix("-h, "))[0]
            assert flag not in found, f"{flag} stands twice"
            found[flag] = ""
        elif re.match(r"──|-----", text) or line.startswith("╭"):
            flag = ""
        if flag:
            found[flag] += f" {text}"
    return found


def as_shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(as_shown, value))
    return repr(value) if value == "" else str(value)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    # Wider, and the boxes stand side by side.
    monkeypatch.setenv("COLUMNS", "90")


def fields(recipe: Recipe) -> Iterator[str]:
    for group in dataclasses.fields(recipe):
        if group.name not in ("own", "given"):
            yield from (field.name for field in dataclasses.fields(getattr(recipe, group.name)))


def test_no_two_settings_share_a_name() -> None:
    names = list(fields(Recipe()))
    assert len(names) == len(set(names)) > 40
    assert set(flat(Recipe())) == set(names)


@pytest.mark.parametrize(("verb", "recipe"), [("train", Recipe()), ("finetune", FINETUNE)])
def test_every_setting_is_a_flag_with_help_and_its_default(
    verb: str, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = helped([verb], capsys)
    settings = flat(recipe)
    assert set(shown) == {"--help"} | {f"--{name.replace('_', '-')}" for name in settings}
    for name, value in settings.items():
        line = shown[f"--{name.replace('_', '-')}"]
        assert f"(default: {as_shown(value)})" in line, line
        said = re.sub(r"\(default.*|--\S+|\{.*?\}|\[.*?\]|\b[A-Z]+\b", "", line)
        assert len(said.split()) >= 3, f"--{name} says nothing about itself: {line}"


@pytest.mark.parametrize(
    ("verb", "kind"),
    [
        (["predict"], predict.Settings),
        (["evaluate"], evaluate.Settings),
        (["models"], models.Settings),
        (["bench", "data"], bench_data.Settings),
    ],
)
def test_so_has_every_setting_of_the_other_verbs(
    verb: list[str], kind: type, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = helped(verb, capsys)
    flags = [line for flag, line in shown.items() if flag != "--help"]
    assert flags
    for line in flags:
        assert re.search(r"\(default: .*\)|\(required\)", line), line
        assert len(re.sub(r"\(.*\)|--\S+|\b[A-Z]+\b", "", line).split()) >= 3, line
    assert set(settings_of(kind)) >= set(shown) - {"--help"}


def settings_of(kind: type) -> Iterator[str]:
    """The flags of a dataclass, those of a group within it among them."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from settings_of(hint)
        else:
            yield f"--{name.replace('_', '-')}"


def test_flags_become_settings_and_leave_the_rest_alone() -> None:
    typed = "--rate 0.5 --size 28 32 --balance --betas 0.8 0.9 --weights w --schedule linear --data d"
    recipe = parse(Recipe, typed.split(), "train", Recipe())
    changed = {name: value for name, value in flat(recipe).items() if value != flat(Recipe())[name]}
    assert changed == {
        "rate": 0.5,
        "size": [28, 32],
        "balance": True,
        "betas": [0.8, 0.9],
        "weights": "w",
        "schedule": "linear",
        "data": "d",
    }
    assert recipe.model.weights == Path("w")
    assert parse(Recipe, ["--rate=0.5", "--no-balance"], "train", recipe).optimiser.rate == 0.5


def test_given_are_the_flags_that_stand_there_be_it_for_the_default() -> None:
    typed = ["--seed", "0", "--no-flip", "--log-every=50", "--size", "28", "32", "--data", "train", "--rate", "-1"]
    assert given(typed) == {"seed", "flip", "log_every", "size", "data", "rate"}
    assert given([]) == frozenset()


def test_help_says_of_no_group_what_its_flags_deny(capsys: pytest.CaptureFixture[str]) -> None:
    """Augmentation alone does nothing, but a recipe flips."""
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "What is done to a batch, in this order." in said
    assert "nothing but normalise" not in said


def from_toml(tmp_path: Path, text: str, *arguments: str) -> Recipe:
    (tmp_path / "settings.toml").write_text(text)
    rest, settings, name = read_toml(["--config", str(tmp_path / "settings.toml"), *arguments])
    return parse(Recipe, rest, "train", with_settings(Recipe(), settings, f"--config {name}"))


def test_toml_sets_any_setting_and_flags_win(tmp_path: Path) -> None:
    text = (
        'data = "a"\nrate = 1\nweight-decay = 0.3\nsize = [28, 32]\nbalance = true\nrandaugment = [2, 9]\nout = "o"\n'
    )
    recipe = from_toml(tmp_path, text, "--rate", "0.25", "--no-balance")
    assert recipe.data.data == "a"
    assert recipe.optimiser.rate == 0.25
    assert recipe.optimiser.weight_decay == 0.3
    assert recipe.data.size == (28, 32)
    assert recipe.data.balance is False
    assert recipe.augmentation.randaugment == (2, 9.0)
    assert recipe.run.out == Path("o")


def test_one_number_may_stand_for_a_size(tmp_path: Path) -> None:
    assert from_toml(tmp_path, "size = 32").data.size == (32,)
    assert with_settings(Recipe(), {"size": 32}, "vitrail.fit").data.size == (32,)
    for wrong in ('"32"', "true", "32.5"):
        with pytest.raises(UserError, match="size"):
            from_toml(tmp_path, f"size = {wrong}")


def test_every_setting_can_stand_in_toml(tmp_path: Path) -> None:
    lines = []
    for name, value in flat(Recipe()).items():
        if value is not None:
            shown = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
            lines.append(f"{name} = {shown}")
    assert from_toml(tmp_path, "\n".join(lines)) == Recipe()


def test_the_file_may_stand_anywhere_and_be_joined_by_an_equals_sign(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("rate = 1.5")
    for arguments in (["--batch", "3", "--config", str(file)], [f"--config={file}", "--batch", "3"]):
        assert read_toml(arguments) == (["--batch", "3"], {"rate": 1.5}, str(file))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rat = 1", ["'rat'", "'rate'"]),
        ("weight_dekay = 1", ["'weight_decay'"]),
        ("rate = = 1", ["not TOML", "line 1"]),
        ('rate = "fast"', ["rate", "'fast'"]),
        ("steps = 1.5", ["steps", "1.5"]),
        ('balance = "yes"', ["balance", "'yes'"]),
        ("betas = [0.9]", ["betas"]),
        ('crop = "random"', ["crop", "'random'", "inception"]),
    ],
)
def test_a_mistake_in_toml_names_the_file_and_the_setting(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        from_toml(tmp_path, text)
    said = str(caught.value)
    assert "settings.toml" in said
    assert "\n" not in said
    assert [word for word in words if word not in said] == [], said


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for arguments in (["--config"], ["--config", str(tmp_path / "none.toml")], ["--config", str(tmp_path)]):
        with pytest.raises(UserError, match="--config"):
            read_toml(arguments)
    with pytest.raises(UserError, match=r"binary\.toml is not TOML"):
        read_toml(["--config", str(tmp_path / "binary.toml")])


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_sentence_is_the_same_whatever_box_the_terminal_can_show(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vitrail", "models", "--resolution", "tall"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "40"},
    )
    assert done.returncode == 2
    assert done.stderr == (
        "vitrail models: --resolution 'tall' is not a whole number (vitrail models --help lists all).\n"
    )


@pytest.mark.parametrize("flag", ["--given", "--network"])
def test_what_is_no_flag_is_not_taken_for_one(flag: str) -> None:
    with pytest.raises(UserError, match=f"^{flag} is not a flag of vitrail train; the nearest is --"):
        parse(Recipe, [flag, "x"], "train")
