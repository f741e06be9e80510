"""`vitrail pretrain`: from a folder of pictures to a backbone that others take as it is; how runs without classes end."""

import json
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pictures import folder
from processes import Nursery
from safetensors.torch import load_file
from torch import Tensor, nn

import vitrail
from vitrail.cli import main
from vitrail.commands.pretrain import pretrain
from vitrail.core.errors import UserError
from vitrail.core.types import Batch, Loss, Preprocess, Progress, Row
from vitrail.data.unlabelled import open_pictures
from vitrail.experiments import build
from vitrail.experiments.plan import DataFacts, Machine, change, plan
from vitrail.experiments.recipe import PRETRAIN, Own, Recipe, check, with_settings
from vitrail.experiments.run import run
from vitrail.models.classifier import Classifier
from vitrail.models.resnet import ResNet
from vitrail.models.vit import ViT

COMMAND = shlex.split("--data data --model ViT-Nano/4 --size 16 --steps 24 --batch 8 --log-every 1 --precision bf16")
RANDOM = shlex.split("--workers 2 --crop inception --flip --shift 2 --dropout 0.1 --drop-path 0.1 --polyak 0.9")
OFTEN = ("--evaluate-every", "0.5")

PLAIN = """
# Figures and the report take longer than the training, and say nothing of it.
import vitrail.experiments.results as results
results.curves = results.write_task_report = lambda *_, **__: None
results.pretraining.pictures = lambda *_, **__: ""
import vitrail.experiments.run as run
run.MEASURED_SECONDS = 0
"""
SLOW = """
import time
from vitrail.training.log import Metrics
quick = Metrics.__call__
def slow(self, line):
    quick(self, line)
    time.sleep(0.05)
Metrics.__call__ = slow
"""


@pytest.fixture(autouse=True, scope="module")
def hasty() -> Iterator[None]:
    """A step is measured once or twice, not for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitrail.experiments.run.MEASURED_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in class folders, and the same ones in a heap."""
    place = tmp_path_factory.mktemp("pretrain")
    folder(place / "data")
    (place / "heap").mkdir()
    for number, file in enumerate(sorted((place / "data").glob("*/*.png"))):
        shutil.copy(file, place / "heap" / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    """A finished run, from pictures that lie in a heap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert pretrain([*COMMAND, "--data", "heap", "--out", "done"]) == 0
    return place / "done"


def test_what_a_run_leaves(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads((done / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "validation, colour of hidden patches",
        "validation, mean of the visible neighbours",
        "validation, always the most frequent colour",
        "validation, loss on corrupted patches",
    ]
    assert rows[0]["low"] <= rows[0]["value"] <= rows[0]["high"]
    assert rows[3]["count"] == 6
    measured = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line["validation/accuracy"] for line in measured if "validation/accuracy" in line]
    assert max(accuracies) == pytest.approx(rows[0]["value"], abs=15)  # bf16, on the few patches there are
    losses = [line["loss"] for line in measured if "loss" in line]
    assert losses[0] == pytest.approx(torch.tensor(512.0).log().item(), abs=1e-3)
    assert losses[-1] < losses[0]
    page = (done / "report.html").read_text()
    assert page.count('<div class="triple">') == 6
    assert page.count("data:image/png;base64,") == 18
    assert "colour of hidden patches" in page
    assert "recognised" not in page
    config = json.loads((done / "config.json").read_text())
    assert config["settings"]["objective"] == "masked-patch"
    assert config["data"]["classes"] == []
    assert config["model"]["config"]["targets"] == "mean-colour"


def test_its_backbone_is_taken_as_it_is(done: Path) -> None:
    backbone = vitrail.load_backbone(done)
    assert isinstance(backbone, ViT)
    assert backbone.preprocess == Preprocess((16, 16))
    best, last = load_file(done / "predictor.safetensors"), load_file(done / "last.safetensors")
    assert best.keys() == last.keys()
    assert {name for name in best if not name.startswith("backbone.")} == {
        "mask",
        "head.output.weight",
        "head.output.bias",
    }
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, best[f"backbone.{name}"]), name
    with pytest.raises(
        UserError, match="has no head, so it cannot classify: load it with load_backbone, or finetune it"
    ):
        vitrail.load(done)


def test_it_can_be_fine_tuned(place: Path, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert (
        main(["finetune", "--data", "data", "--weights", "done", "--steps", "2", "--batch", "8", "--out", "tuned"]) == 0
    )
    tuned, backbone = vitrail.load(place / "tuned"), vitrail.load_backbone(done)
    assert tuned.labels == ("class0", "class1", "class2")
    assert tuned.preprocess == backbone.preprocess
    first = next(iter(backbone.parameters()))
    assert (next(iter(tuned.backbone.parameters())) - first).abs().max() < 0.1


def test_it_goes_on_from_other_weights(place: Path, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    settings = [
        "--data",
        "heap",
        "--weights",
        "done",
        "--steps",
        "1",
        "--batch",
        "8",
        "--targets",
        "pixels",
        "--rate",
        "1e-9",
    ]
    assert pretrain([*settings, "--out", "more"]) == 0
    before, after = vitrail.load_backbone(done).state_dict(), vitrail.load_backbone(place / "more").state_dict()
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)
    assert load_file(place / "more" / "predictor.safetensors")["head.output.bias"].shape == (4 * 4 * 3,)
    rows = json.loads((place / "more" / "results.json").read_text())["rows"]
    assert rows[3]["unit"] == ""


def test_labels_change_nothing(place: Path, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same pictures as classes, whose names come in another order in their folders: the same model but for the order.
    monkeypatch.chdir(place)
    shutil.copytree(place / "data", place / "renamed")
    (place / "renamed" / "class0").rename(place / "renamed" / "class00")
    for name in ("data", "renamed"):
        assert pretrain([*COMMAND, "--data", name, "--validation", "0", "--steps", "3", "--out", f"from-{name}"]) == 0
    found, expected = (load_file(place / f"from-{name}" / "last.safetensors") for name in ("renamed", "data"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Killed and continued.


def same(run: Path, whole: Path) -> None:
    for name in ("model.safetensors", "predictor.safetensors", "last.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    found, expected = (torch.load(path / "state.pt", weights_only=True) for path in (run, whole))
    found.pop("seconds"), expected.pop("seconds")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    timed = ("seconds", "images_per_second", "input_bound_percent")
    lines = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (run, whole)]
    measured = [[{k: v for k, v in line.items() if k not in timed} for line in some] for some in lines]
    assert measured[0] == measured[1]
    assert (
        json.loads((run / "results.json").read_text())["rows"]
        == json.loads((whole / "results.json").read_text())["rows"]
    )


def test_a_killed_run_goes_on_to_the_bit(place: Path) -> None:
    processes = Nursery(place)
    command = (
        "train",
        "--objective",
        "masked-patch",
        *COMMAND,
        *RANDOM,
        *OFTEN,
        "--steps",
        "14",
        "--save-minutes",
        "0",
    )
    code, _, error = processes.run(*command, "--out", "whole", first=PLAIN)
    assert code == 0, error
    child = processes.start(*command, "--out", "killed", first=PLAIN + SLOW)
    metrics = place / "killed" / "metrics.jsonl"

    def at(step: int) -> Callable[[], bool]:
        return lambda: metrics.exists() and f'"step": {step},' in metrics.read_text()

    for step in (3, 9):
        child.until(at(step)).signal(signal.SIGKILL)
        assert child.code() == -signal.SIGKILL
        child = processes.start(*command, "--out", "killed", "--resume", first=PLAIN + SLOW)
    assert child.code() == 0, child.err.read_text()
    same(place / "killed", place / "whole")


# What is refused.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--mixup 0.2", "--mixup is about labels, and masked patch prediction reads none; leave it out."),
        ("--cutmix 1", "--cutmix is about labels"),
        ("--smoothing 0.1", "--smoothing is about labels"),
        ("--balance", "--balance is about labels"),
        ("--baselines", "--baselines is about labels"),
        ("--loss sigmoid", "--loss is about labels"),
        ("--head keep", "--head is about labels"),
        ("--representation 8", "--representation is about labels"),
        ("--erasing 0.5", "--erasing would have its noise predicted"),
        ("--pool attention", "--pool attention has weights that masked patch prediction does not train"),
        ("--corrupt 1", "--corrupt is 1; give a number from 0.01 to 0.99."),
        ("--objective supervised", "--objective supervised is what vitrail train does"),
        (
            "--model BiT-R50x1",
            "--model BiT-R50x1 is a ResNet, which has no patch embeddings to corrupt; give a ViT",
        ),
        ("--targets downsized --model ViT-Nano/2", "a patch of 2 x 2 pixels cannot be downsized"),
        ("--model ViT-Nano/16", "with a single patch nothing is left to predict it from"),
        ("--data nowhere", "nowhere does not exist"),
    ],
)
def test_refusals(flags: str, said: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(UserError) as found:
        pretrain([*COMMAND, *shlex.split(flags), "--out", "refused", "--dry-run"])
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_train_refuses_its_settings() -> None:
    with pytest.raises(UserError, match="--targets and --corrupt are of --objective masked-patch"):
        check(with_settings(Recipe(), {"corrupt": 0.3}, "a test"))
    with pytest.raises(UserError, match="the recipe brings a network"):
        check(Recipe(objective=PRETRAIN.objective, own=Own(network=lambda _: nn.Identity())))


def test_a_resnet_is_made_without_what_it_lacks() -> None:
    facts, machine = DataFacts(100, 2, 128, 128), Machine("cpu", 1, 1 << 30, False)
    recipe = with_settings(Recipe(), {"model": "BiT-R50x1"}, "a test")
    planned, said = plan(recipe, facts, machine)
    assert planned.model.pool == "mean"
    assert not any("positions" in line or "pool" in line for line in said)
    made, _ = build.model(planned, ("a", "b"), None)
    assert isinstance(made, Classifier)
    assert isinstance(made.backbone, ResNet)
    with pytest.raises(
        UserError, match=r"--dropout 0\.1 is for ViTs, and --model BiT-R50x1 is a ResNet; leave it out\."
    ):
        build.model(change(planned, "model", dropout=0.1), ("a", "b"), None)


# Runs with an objective of their own, and with a known result.


class Brightness:
    """Learns to say how bright a picture is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, batch: Batch, seed: int) -> Loss:
        bright = batch.views[0].float().mean((1, 2, 3)) / 255
        return Loss((self.model(batch.views[0])[:, 0] - bright).square().mean())

    def after_backward(self, progress: Progress) -> None: ...

    def after_step(self, progress: Progress) -> None: ...


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(images.float().mean((2, 3)) / 255)


def own(place: Path, evaluated: bool) -> Recipe:
    splits = open_pictures(str(place / "heap"))

    def evaluate(model: nn.Module) -> list[Row]:
        worth = float(next(model.parameters()).detach().abs().sum())
        return [Row("slope", worth, unit="", count=6), Row("half of it", worth / 2, worth / 4, worth, unit="%")]

    brings = Own(
        splits=splits,
        network=lambda _: Line(),
        preprocess=Preprocess((8, 8)),
        objective=Brightness,
        evaluate=evaluate if evaluated else None,
        surveyed=True,
    )
    recipe = change(Recipe(own=brings), "length", steps=4)
    return change(change(recipe, "data", batch=8), "run", out=place / f"own-{evaluated}")


def test_an_own_objective_is_reported_with_its_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(own(place, True), ("a recipe",), expected=2.5)
    said = capsys.readouterr().out
    assert "looked at" not in said  # surveyed before
    assert [row.name for row in result.rows] == ["slope", "half of it"]
    assert result.rows[0].expected == 2.5
    assert f"slope: {result.rows[0].value:.4f} of 6 after" in said
    assert f"expected 2.50, got {result.rows[0].value:.2f}\n" in said
    kept = json.loads((place / "own-True" / "results.json").read_text())["rows"]
    assert (kept[0]["expected"], kept[1]["expected"]) == (2.5, None)
    best = load_file(place / "own-True" / "model.safetensors")["output.weight"].abs().sum()
    assert result.rows[0].value == pytest.approx(float(best))
    page = (place / "own-True" / "report.html").read_text()
    assert "Expected were 2.500." in page
    assert "half of it" in page


def test_without_an_evaluator_its_loss_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(own(place, False))
    assert [row.name for row in result.rows] == ["training loss of the last steps"]
    assert "(the last weights)" in capsys.readouterr().out
    assert (place / "own-False" / "report.html").exists()


def test_a_known_result_is_said_beside_the_one_found(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    settings = {"data": "data", "model": "ViT-Nano/4", "size": [16], "steps": 2, "batch": 8, "out": "expected"}
    result = run(with_settings(Recipe(), settings, "a test"), expected=84.15)
    row = result.rows[0]
    assert row.expected == 84.15
    assert f"expected 84.15, got {row.value:.2f} [{row.low:.2f}, {row.high:.2f}]\n" in capsys.readouterr().out
    assert json.loads((place / "expected" / "results.json").read_text())["rows"][0]["expected"] == 84.15
    assert "expected were 84.15 %" in (place / "expected" / "report.html").read_text()
