"""`vitrail vtab`: what is there, what is missing, measuring, going on, and the means as the paper has them."""

import json
from pathlib import Path
from typing import Any

import benchmark_files as made
import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import t as student

from vitrail.commands.flags import parse
from vitrail.commands.vtab import Settings, results, run
from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.data.vtab import TASKS
from vitrail.evaluation.means import mean_interval, student_95
from vitrail.experiments import vtab
from vitrail.experiments.vtab import Benchmark, Measured, Protocol, published_means, recipe_for, rows
from vitrail.inference.features import Model
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights.native import save


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = ClassifierConfig(ViTConfig(32, 1, 2, 64, (8, 8), (16, 16)), 3).build(seed=3)
    model.labels, model.preprocess = ("a", "b", "c"), Preprocess((16, 16))
    save(model, folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dSprites and sNORB in their owners' files, and a damaged KITTI."""
    folder = tmp_path_factory.mktemp("tasks")
    made.dsprites(folder / "dsprites", 120)
    made.norb(folder / "smallnorb", 60, 40)
    made.kitti(folder / "kitti", 30, 20)
    for file in (folder / "kitti/training/label_2").iterdir():
        file.write_text("Bus 1 2 3\n")
    return folder


def asked(root: Path, *arguments: str) -> Settings:
    return parse(Settings, ["--root", str(root), *arguments], "vtab")


def answer(capsys: pytest.CaptureFixture[str], settings: Settings, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert run(settings) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_list_says_what_is_there_and_who_publishes_the_rest(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, asked(root, "--list", "--json"))["tasks"]
    by_name = {entry["task"]: entry for entry in found}
    assert list(by_name) == list(TASKS)
    assert {name for name, entry in by_name.items() if entry["there"]} == {
        "dspr-loc",
        "dspr-ori",
        "snorb-azim",
        "snorb-elev",
    }
    assert "cannot be read as a KITTI label file" in by_name["kitti-dist"]["problem"]
    assert by_name["eurosat"]["where"] == "https://github.com/phelber/eurosat"
    assert by_name["eurosat"]["licence"] == "MIT"
    assert run(asked(root, "--list", "--tasks", "eurosat", "dspr-loc")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "missing: TFDS's eurosat/rgb:2.*, or lists; published at https://github.com/phelber/eurosat (licence: MIT)"
        in shown
    )
    assert "not VTAB-1k's sample (train has 120" in shown


def test_linear_measures_and_goes_on(
    root: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [str(weights), "--method", "linear", "--tasks", "dspr-loc", "snorb-elev", "--json"]
    flags += ["--out", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"), "--workers", "0"]
    first = answer(capsys, asked(root, *flags))
    assert [m["task"] for m in first["measured"]] == ["dspr-loc", "snorb-elev"]
    assert [m["count"] for m in first["measured"]] == [12, 20]
    assert all(m["sample"].startswith("not VTAB-1k's sample") for m in first["measured"])
    assert [row["name"] for row in first["rows"]] == [
        "dSpr-Loc",
        "sNORB-Elev",
        "structured mean of 2 of 8 tasks",
        "VTAB-1k mean of 2 of 19 tasks",
    ]
    mean = np.mean([m["accuracy"] for m in first["measured"]])
    assert first["rows"][-1]["value"] == pytest.approx(100 * mean)
    assert first["published"]["dspr-loc"]["H/14 JFT"] == 79.4
    # Nothing is computed again, until the weights or the settings are others.
    calls: list[str] = []
    monkeypatch.setattr(vtab.Benchmark, "_linear", lambda self, task, draw: calls.append(task.name) or (0.5, 2))
    assert answer(capsys, asked(root, *flags))["measured"] == first["measured"]
    assert calls == []
    answer(capsys, asked(root, *flags, "--precision", "bf16"))
    assert calls == ["dspr-loc", "snorb-elev"]


def test_finetune_is_a_run(root: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few steps: a run folder as any training's, beside what is kept of the task."""
    flags = [str(weights), "--tasks", "dspr-ori", "--seeds", "1", "--steps", "3", "--batch", "8", "--size", "16"]
    flags += ["--out", str(tmp_path / "results"), "--workers", "0", "--device", "cpu"]
    assert run(asked(root, *flags)) == 0
    said = capsys.readouterr().out
    assert "fine-tuning, 3 steps of 8 at 0.01 and 16 px (not the paper's setting)" in " ".join(said.split())
    folders = sorted(path for path in (tmp_path / "results").iterdir() if path.is_dir())
    assert len(folders) == 1
    config = json.loads((folders[0] / "config.json").read_text())
    assert (config["settings"]["steps"], config["settings"]["flip"], config["settings"]["crop"]) == (3, False, "none")
    kept = [json.loads(file.read_text())["measured"] for file in sorted((tmp_path / "results").glob("*.json"))]
    assert [(m["seed"], m["count"]) for m in kept] == [(0, 12)]


def test_the_papers_recipe() -> None:
    """B.1.1: one setting for all tasks; mirrored only where that leaves the label as it is."""
    recipe = recipe_for(TASKS["caltech101"], Protocol(), Path("w"))
    assert (recipe.length.steps, recipe.data.batch, recipe.data.size, recipe.optimiser.rate) == (
        2500,
        512,
        (384,),
        0.01,
    )
    assert (recipe.optimiser.optimiser, recipe.optimiser.weight_decay, recipe.schedule.schedule) == (
        "sgd",
        0.0,
        "cosine",
    )
    assert (recipe.augmentation.flip, recipe.data.crop) == (True, "inception")
    assert {name for name, task in TASKS.items() if not task.flip} == {"svhn", "dspr-loc", "dspr-ori", "snorb-azim"}


def test_a_model_whose_patches_do_not_fill_the_papers_pictures(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Patches of 14, as the paper's H/14: 378 px, which is the paper's setting of that model."""
    model = ClassifierConfig(ViTConfig(16, 1, 2, 16, (14, 14), (28, 28)), 3).build(seed=3)
    model.labels, model.preprocess = ("a", "b", "c"), Preprocess((28, 28))
    save(model, tmp_path / "model")
    flags = [str(tmp_path / "model"), "--tasks", "dspr-loc", "--seeds", "1", "--steps", "1", "--batch", "1"]
    flags += ["--out", str(tmp_path / "results"), "--workers", "0", "--device", "cpu"]
    assert run(asked(root, *flags)) == 0
    assert "fine-tuning, 1 steps of 1 at 0.01 and 378 px (not the paper's setting)" in capsys.readouterr().out
    (config,) = (tmp_path / "results").glob("*/config.json")
    assert json.loads(config.read_text())["settings"]["size"] == [378]
    with pytest.raises(UserError, match=r"^--size 384: a picture of 384 x 384 .* are 378 x 378 or 392 x 392\.$"):
        run(asked(root, *flags, "--size", "384"))

    def said(model: Model, **protocol: Any) -> str:
        return Benchmark(model, tmp_path, Protocol(**protocol), tmp_path, torch.device("cpu")).said

    assert said(model, size=378).endswith("and 378 px, for patches that do not fill 384, as in the paper")
    assert said(model, size=392).endswith("and 392 px (not the paper's setting)")
    other = ViTConfig(16, 1, 2, 16, (6, 6), (24, 24)).build()
    assert said(other, size=378).endswith("(not the paper's setting)")
    assert said(other).endswith("at 0.01 and 384 px, as in the paper")
    assert said(other, method="linear").startswith("logistic regression")


def test_means_as_the_paper_has_them() -> None:
    """Table 9's own last column, from its 19 others; and the same arithmetic on our rows."""
    theirs = published_means()["VTAB-1k"]
    assert {name: round(value, 1) for name, value in theirs.items()} == {
        "H/14 JFT": 77.6,
        "L/16 JFT": 76.3,
        "L/16 I21k": 72.7,
    }
    random = np.random.default_rng(0)
    measured = [
        Measured(name, seed, float(random.uniform(0.3, 0.9)), 100, "VTAB-1k's sample")
        for name in TASKS
        for seed in range(3)
    ]
    table = {row.name: row for row in rows(measured)}
    assert list(table)[-4:] == ["natural mean", "specialized mean", "structured mean", "VTAB-1k mean"]
    by_seed = [[m.accuracy for m in measured if m.seed == seed] for seed in range(3)]
    scores = [100 * float(np.mean(values)) for values in by_seed]
    row = table["VTAB-1k mean"]
    assert row.value == pytest.approx(np.mean(scores))
    half = student.ppf(0.975, 2) * np.std(scores, ddof=1) / 3**0.5
    assert (row.low, row.high) == (pytest.approx(row.value - half), pytest.approx(row.value + half))
    natural = [
        np.mean([m.accuracy for m in measured if m.seed == s and TASKS[m.task].group == "natural"]) for s in range(3)
    ]
    assert table["natural mean"].value == pytest.approx(100 * np.mean(natural))
    console = Console(record=True, width=200)
    console.print(results(measured))
    line = next(line for line in console.export_text().splitlines() if line.startswith("VTAB-1k mean"))
    assert line.split()[-3:] == ["77.6", "76.3", "72.7"]


def test_student_and_single_runs() -> None:
    for freedom in (1, 2, 3, 9, 40):
        assert student_95(freedom) == pytest.approx(student.ppf(0.975, freedom), rel=1e-6)
    assert mean_interval([0.5]) == (0.5, None, None)
    one = rows([Measured("pets", 0, 0.9, 100, "VTAB-1k's sample")])[0]
    assert one.low is not None
    assert one.high is not None
    assert 80 < one.low < 90 < one.high < 95


def test_mistakes(root: Path, weights: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ([], "vtab needs weights; give a checkpoint, or --list"),
        (["--tasks", "snorb", "--list"], "--tasks snorb is no task of VTAB-1k; they are caltech101"),
        ([str(weights), "--tasks", "eurosat", "pets"], r"has files of none of these tasks \(pets, eurosat\)"),
        ([str(weights), "--tasks", "dspr-loc", "--steps", "0"], "--steps is 0; give at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            run(asked(root, *arguments))
    with pytest.raises(UserError, match="does not exist; give the folder with the tasks' files"):
        run(asked(tmp_path / "nowhere", "--list"))
    torch.set_num_threads(1)
