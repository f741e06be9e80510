"""`vitrail recipes`, `vitrail recipe NAME` and `vitrail run NAME`, as a person has them."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import picture

from vitrail import cli
from vitrail.commands import recipes
from vitrail.commands.flags import parse
from vitrail.commands.train import read_recipe
from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.data.splits import Splits
from vitrail.experiments import paper_costs, sweep
from vitrail.experiments.paper import TABLE_4
from vitrail.experiments.paper_names import cell
from vitrail.experiments.paper_results import Start
from vitrail.experiments.paper_run import complete, differences
from vitrail.experiments.plan import change
from vitrail.experiments.recipe import Recipe
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights.native import save

DOCS = Path(__file__).parents[1] / "docs" / "recipes.md"
TINY = ["--size", "16", "--batch", "8", "--workers", "0", "--steps", "2", "--device", "cpu"]
Say = pytest.CaptureFixture[str]


def listed(*arguments: str) -> int:
    return recipes.run(parse(recipes.Settings, arguments, "recipes"))


def told(*arguments: str) -> int:
    return recipes.run_one(parse(recipes.OneSettings, arguments, "recipe"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, each in (("train", 20), ("test", 5)):
        for label in range(2):
            (root / split / f"class{label}").mkdir(parents=True)
            for number in range(each):
                picture(random, label, 16).save(root / split / f"class{label}" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = ClassifierConfig(ViTConfig(32, 1, 2, 64, (8, 8), (16, 16)), 3).build(seed=3)
    model.preprocess = Preprocess((16, 16))
    save(model, tmp_path_factory.mktemp("model"))
    return next(tmp_path_factory.getbasetemp().glob("model*"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vitrail.experiments.run.MOST_MEASURED", 3)  # nothing here rests on the estimate
    return tmp_path


def refused(capsys: Say, *arguments: object) -> str:
    assert cli.main(list(map(str, arguments))) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_the_list_as_tables(capsys: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert listed() == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if len(line) > 82] == []
    assert "…" not in said
    (line,) = [line for line in said.splitlines() if line.split()[:2] == ["vit-h14-jft", "14"]]
    assert line.split() == ["vit-h14-jft", "14", "0.0003", "0.1", "0", "4,258", "4,262", "2,500"]
    (line,) = [line for line in said.splitlines() if line.split()[:1] == ["vit-l16-jft"] and "87.12" in line]
    assert line.split() == ["vit-l16-jft", "87.12", "89.99", "99.38", "94.04", "97.11", "99.56"]


def test_the_list_by_words_and_as_json(capsys: Say) -> None:
    assert listed("b16", "cifar10") == 0
    said = capsys.readouterr().out
    assert "finetune-vit-b16-i21k-cifar10" in said
    assert "cifar100" not in said
    assert listed("--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert len(rows) > 200
    assert rows["vit-h14-jft"]["tpu_core_days"] == 2500
    assert rows["finetune-vit-b16-i21k-cifar10"]["rates"] == [0.001, 0.003, 0.01, 0.03]
    assert rows["finetune-vit-b16-i21k-cifar10"]["published"][0]["value"] == 98.95
    with pytest.raises(UserError, match="no recipe's name holds b16 and mnist"):
        listed("b16", "mnist")


def test_the_page_is_current(capsys: Say) -> None:
    assert listed("--markdown") == 0
    assert DOCS.read_text(encoding="utf-8").endswith("\n\n" + capsys.readouterr().out), (
        "docs/recipes.md ends in what `vitrail recipes --markdown` prints; print it again"
    )


def test_one_recipe(capsys: Say) -> None:
    assert told("r50-vit-l32-jft") == 0
    said = capsys.readouterr().out
    for words in (
        "rate 0.0002",
        "(adamw)",
        "bias -10",
        "Inception crop and flip",
        "247 exaFLOPs",
        "246",
        "6e-4",
        "7 epochs",
    ):
        assert words in said, words
    assert told("finetune-vit-b16-cifar10", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["rate"] == 0.01
    assert found["steps"] == 10_000
    assert len(found["notes"]) >= 2
    with pytest.raises(UserError, match="nearest is vit-b16-jft"):
        told("vit-b16-jtf")


def test_the_hours_here_are_measured(capsys: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_costs, "ENOUGH", 0.0)
    with monkeypatch.context() as patch:
        small = dataclasses.replace(cell("vit-b32-imagenet"), start=Start("ViT-Nano/16", "imagenet", 300))
        patch.setattr(recipes, "cell", lambda _: small)
        assert told("vit-b32-imagenet", "--measure", "--device", "cpu", "--json") == 0
        found = json.loads(capsys.readouterr().out)["measured"]
        assert (found["batch"], found["device"]) == (1, "cpu")
        assert found["hours"] == pytest.approx(found["seconds"] * 1_281_167 * 300 / 3600)
        assert told("vit-b32-imagenet", "--measure", "--device", "cpu") == 0
        assert "hours" in capsys.readouterr().out
    monkeypatch.setattr(paper_costs, "memory", lambda: 2**30)
    with pytest.raises(UserError, match=r"ViT-H/14 needs \d+ GiB"):
        told("vit-h14-jft", "--measure", "--device", "cpu")


def test_pre_training_by_name(data: Path, here: Path, capsys: Say) -> None:
    command = ["run", "vit-b16-imagenet", "--data", str(data), *TINY, "--model", "ViT-Nano/8", "--out", "run"]
    assert cli.main([*command, "--validation", "0.1", "--representation", "8", "--augreg", "strong1"]) == 0
    said = capsys.readouterr().out
    assert "note: this run is not the paper's: 2 steps (the paper's: 300 epochs), size 16 (the paper's: 224)" in said
    assert "model ViT-Nano/8 (the paper's: ViT-B/16)" in said
    assert "expected 74.79, got" in said
    results = json.loads((here / "run" / "results.json").read_text())
    assert results["rows"][0]["expected"] == 74.79
    assert results["rows"][0]["count"] == 10
    settings = json.loads((here / "run" / "config.json").read_text())["settings"]
    assert (settings["loss"], settings["head_bias"], settings["weight_decay"]) == ("sigmoid", -6.9, 0.3)
    assert (settings["mixup"], settings["randaugment"]) == (0.5, [2, 20.0])
    assert settings["warmup"] == 0


def test_a_sweep_chooses_on_held_out_pictures_and_goes_on(
    data: Path, weights: Path, here: Path, capsys: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rates, of which one diverges, and at the third a Ctrl-C."""
    monkeypatch.setitem(TABLE_4, "pets", dataclasses.replace(TABLE_4["pets"], rates=(0.001, 1e30, 0.003)))
    begun: list[tuple[str, bool, int]] = []
    run = sweep.run

    def counted(recipe: Recipe, *rest: Any, **more: Any) -> Any:
        assert recipe.own.splits is not None
        assert recipe.run.out is not None
        begun.append((recipe.run.out.name, recipe.own.splits.test is not None, len(recipe.own.splits.train)))
        if len(begun) == 3:
            raise KeyboardInterrupt
        return run(recipe, *rest, **more)

    monkeypatch.setattr(sweep, "run", counted)
    command = ["run", "finetune-vit-b16-jft-pets", "--data", str(data), "--weights", str(weights), "--sweep", *TINY]
    assert cli.main(command) == 130
    capsys.readouterr()
    assert "already holds a sweep; add --resume" in refused(capsys, *command)
    assert "began with --batch 8, not 4" in refused(capsys, *command, "--batch", "4", "--resume")
    assert cli.main([*command, "--resume"]) == 0
    assert [name for name, _, _ in begun] == ["rate-0.001", "rate-1e+30", "rate-0.003", "rate-0.003", "final"]
    # The test pictures are nowhere but in the end, and the end has all of the training pictures.
    assert [test for _, test, _ in begun] == [False] * 4 + [True]
    assert [count for _, _, count in begun] == [36] * 4 + [40]
    said = capsys.readouterr().out
    assert "rate-0.001 is finished" in said
    assert "1e+30  diverged" in said
    assert "expected 95.80" in said
    record = json.loads((here / "runs" / "finetune-vit-b16-jft-pets-sweep" / "sweep.json").read_text())
    tried = {entry["rate"]: entry["row"] for entry in record["tried"]}
    assert tried.pop(1e30) is None
    assert record["rate"] == max(tried, key=lambda rate: tried[rate]["value"])
    assert [row["count"] for row in tried.values()] == [4, 4]
    assert record["test"]["count"] == 10
    # Asked once more, nothing is trained and nothing measured.
    assert cli.main([*command, "--resume"]) == 0
    assert len(begun) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["vit-b16-jtf"], ["'vit-b16-jtf'", "nearest is vit-b16-jft"]),
        (["vit-b16-jft"], ["JFT-300M is not public", "--data FOLDER"]),
        (["vit-b16-imagenet"], ["--data imagenet=PATH"]),
        (["vit-h14-imagenet"], ["leaves this cell empty"]),
        (["vit-b16-imagenet", "--data", "cifar10=x"], ["trains on ImageNet", "--data imagenet=PATH"]),
        (["vit-b16-imagenet", "--data", "imagenet=missing"], ["imagenet:missing does not exist"]),
        (
            ["finetune-vit-b16-jft-pets", "--data", "x"],
            ["not public", "--weights the run folder of vitrail run"],
        ),
        (["vit-b16-jft", "--data", "x", "--sweep"], ["Table 3 gives vit-b16-jft one rate"]),
        (["finetune-vit-b16-i21k-vtab-dmlab", "--data", "x", "--sweep"], ["one rate, 0.01"]),
        (["finetune-vit-b16-cifar10", "--data", "x", "--sweep", "--rate", "1"], ["leave --rate or --sweep out"]),
        (["vit-b16-jft", "--data", "x", "--augreg", "huge"], ["--augreg 'huge'", "light1"]),
        (["vit-b16-jft", "--data", "x", "--augreg"], ["--augreg ''"]),
        (["vit-b16-jft", "--data", "x", "--epochs", "0"], ["without a length"]),
        (["vit-b16-jft", "--data", "x", "--bach", "3"], ["--bach", "vitrail run vit-b16-jft", "--batch"]),
        (["missing.py"], ["missing.py"]),
        (["missing.py", "--sweep"], ["--sweep is for the recipes"]),
    ],
    ids=" ".join,
)
def test_what_cannot_be_run(arguments: list[str], words: list[str], capsys: Say) -> None:
    said = refused(capsys, "run", *arguments)
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    ("given", "counts", "chosen_on"), [([], (36, 4), "train"), (["--validation", "0"], (40, 6), "val")]
)
def test_a_sweep_holds_out_training_pictures_though_the_data_bring_others(
    given: list[str],
    counts: tuple[int, int],
    chosen_on: str,
    data: Path,
    weights: Path,
    here: Path,
    capsys: Say,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """B.1.1's development set is a share of the training pictures; Flowers have validation pictures beside."""
    shutil.copytree(data, here / "flowers")
    random = np.random.default_rng(1)
    for label in range(2):
        (here / "flowers" / "val" / f"class{label}").mkdir(parents=True)
        for number in range(3):
            picture(random, label, 16).save(here / "flowers" / "val" / f"class{label}" / f"{number}.png")
    begun: list[Splits] = []
    run = sweep.run

    def seen(recipe: Recipe, *rest: Any, **more: Any) -> Any:
        assert recipe.own.splits is not None
        begun.append(recipe.own.splits)
        return run(recipe, *rest, **more)

    monkeypatch.setattr(sweep, "run", seen)
    monkeypatch.setitem(TABLE_4, "flowers", dataclasses.replace(TABLE_4["flowers"], rates=(0.001, 0.003)))
    command = ["run", "finetune-vit-b16-jft-flowers", "--data", "flowers", "--weights", str(weights), "--sweep", *TINY]
    assert cli.main([*command, *given]) == 0
    said = capsys.readouterr().out
    *tried, last = begun
    assert len(tried) == 2
    for one in tried:
        assert one.validation is not None
        assert (len(one.train), len(one.validation), one.test) == (*counts, None)
        places = {Path(str(one.validation[index].picture)).parts[1] for index in range(len(one.validation))}
        assert places == {chosen_on}
    assert (len(last.train), last.validation) == (40, None)
    assert ("the 6 validation pictures of flowers are left unused" in said) == (not given)


def test_a_sweep_needs_test_pictures(data: Path, weights: Path, capsys: Say) -> None:
    command = ["run", "finetune-vit-b16-jft-pets", "--data", data / "train", "--weights", weights, "--sweep", *TINY]
    assert "has no test ones" in refused(capsys, *command)


def test_a_changed_length_takes_the_warm_up_with_it() -> None:
    one = cell("finetune-vit-b16-cifar10")
    given = change(change(one.recipe, "data", data="x"), "length", steps=one.recipe.length.steps, epochs=3.0)
    made = complete(one, given)
    assert (made.length.steps, made.length.epochs, made.schedule.warmup) == (0, 3.0, -1)
    assert differences(one, made)[0] == "3 epochs (the paper's: 10000 steps)"
    untouched = complete(one, change(one.recipe, "data", data="x"))
    assert untouched.schedule.warmup == 500
    assert differences(one, untouched) == []


def test_the_example_begins_from_a_recipe_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    recipe = read_recipe(str(DOCS.parents[1] / "examples" / "vit_s16_imagenet.py"))
    monkeypatch.delitem(sys.modules, "vit_s16_imagenet")
    assert (recipe.model.model, recipe.model.pool, recipe.augmentation.mixup) == ("ViT-S/16", "mean", 0.2)
    assert (recipe.schedule.warmup, recipe.optimiser.clip) == (10_000, 1.0), "the paper's, which it leaves alone"


def test_its_help_says_what_a_name_is(capsys: Say) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "vitrail recipes lists them" in said
    assert "--sweep" in said
