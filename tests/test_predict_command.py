"""`vitrail predict`: every way of naming pictures, every way of printing, and nothing lost to a bad one."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.commands.predict import Settings, find, run
from vitrail.commands.reading import Checkpoint
from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights.native import save

LABELS = ("red [b]", "green", "blue", "grey", "white", "black")


def small(classes: int = 6, labels: tuple[str, ...] = LABELS) -> Classifier:
    model = ClassifierConfig(ViTConfig(32, 1, 2, 64, (8, 8), (16, 16)), classes).build(seed=3)
    with torch.no_grad():
        model.head.output.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    model.labels = labels
    model.preprocess = Preprocess((16, 16))
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(small(), folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures of the model's own size, so that nothing but the model decides, two of them in a folder below."""
    random = np.random.default_rng(0)
    for number in range(5):
        place = tmp_path / "pictures" / ("below" if number % 2 else ".") / f"p[{number}].png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place)
    return tmp_path / "pictures"


def own(path: Path) -> list[tuple[str, float]]:
    """What the model says, asked directly."""
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
    with torch.no_grad():
        probabilities = torch.softmax(small()(pixels)[0].double(), 0)
    order = torch.argsort(probabilities, descending=True).tolist()
    return [(LABELS[label], probabilities[label].item()) for label in order]


@pytest.mark.parametrize(("batch", "workers"), [(64, -1), (2, 0), (2, 2)])
def test_json_is_what_the_model_says(
    weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str], batch: int, workers: int
) -> None:
    assert run(Settings(weights, (str(pictures),), top=3, json=True, batch=batch, workers=workers)) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [Path(a["picture"]).name for a in answers] == [f"p[{n}].png" for n in (1, 3, 0, 2, 4)]
    for answer in answers:
        expected = own(Path(answer["picture"]))[:3]
        assert [p["class"] for p in answer["predictions"]] == [name for name, _ in expected]
        found = [p["probability"] for p in answer["predictions"]]
        np.testing.assert_allclose(found, [p for _, p in expected], rtol=1e-4)


def test_bad_pictures_are_named_once_and_cost_nothing_else(
    weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "empty.png").touch()
    (pictures / "text.jpg").write_text("hello")
    whole = (pictures / "p[0].png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    names = (str(pictures), "nowhere.png", "none/*.jpg")
    assert run(Settings(weights, names, json=True, batch=2, workers=0)) == 2
    said = capsys.readouterr()
    answers = json.loads(said.out)
    assert sum("predictions" in a for a in answers) == 5
    assert {Path(a["picture"]).name for a in answers if "reason" in a} == {
        "empty.png", "text.jpg", "cut.png", "nowhere.png", "*.jpg",
    }  # fmt: skip
    for name in ("empty.png", "text.jpg", "cut.png", "nowhere.png", "none/*.jpg"):
        assert sum(name in line for line in said.err.splitlines()) == 1, name
    assert said.err.splitlines()[-1] == "5 of 10 could not be read."


def test_csv_and_table(weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = pictures / "p[0].png"
    assert run(Settings(weights, (str(first),), csv=True, top=99)) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["class"] for line in lines] == [name for name, _ in own(first)]
    assert [line["rank"] for line in lines] == list("123456")
    assert sum(float(line["probability"]) for line in lines) == pytest.approx(1, abs=1e-5)
    assert run(Settings(weights, (str(first),), top=6)) == 0
    table = capsys.readouterr().out
    # The square brackets are part of the names, no mark-up.
    assert "red [b]" in table
    assert "".join(table.split()).count("p[0].png") == 1
    name, probability = own(first)[0]
    assert f"{100 * probability:.2f} %" in table
    assert name in table


def test_ways_of_naming_pictures(pictures: Path) -> None:
    samples, problems = find([str(pictures / "*.png"), str(pictures / "p[0].png"), str(pictures / "**" / "p?3?.png")])
    assert [Path(sample.name).name for sample in samples] == [
        "p[0].png",
        "p[2].png",
        "p[4].png",
        "p[0].png",
        "p[3].png",
    ]
    assert problems == []
    (pictures / "bare").mkdir()
    samples, problems = find([str(pictures / "bare")])
    assert len(samples) == 0
    assert [problem.problem for problem in problems] == [
        f"{pictures / 'bare'} holds no pictures; give a folder that does."
    ]


def test_a_picture_on_standard_input(weights: Path, pictures: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vitrail.commands.predict import Settings, run; "
        "sys.exit(run(Settings(Path(sys.argv[1]), ('-',), json=True, top=1)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(weights)],
        input=(pictures / "p[0].png").read_bytes(),
        capture_output=True,
        check=True,
    )
    (answer,) = json.loads(done.stdout)
    assert answer["picture"] == "standard input"
    assert answer["predictions"][0]["class"] == own(pictures / "p[0].png")[0][0]


def test_answers_that_are_not_finite_are_not_given(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small()
    with torch.no_grad():
        model.head.output.weight.fill_(3e38)  # finite itself; its sums are not
    save(model, tmp_path / "broken")
    assert run(Settings(tmp_path / "broken", (str(pictures / "p[0].png"),))) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "p[0].png: the model's answer is not finite" in said.err


def test_names_that_are_no_text(weights: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = pictures / "caf\udce9.png"
    odd.write_bytes((pictures / "p[0].png").read_bytes())
    assert run(Settings(weights, (str(odd),), json=True)) == 0
    assert "caf\\udce9.png" in json.loads(capsys.readouterr().out)[0]["picture"]
    assert run(Settings(weights, (str(odd),))) == 0


def test_without_labels_classes_are_numbers(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(small(labels=()), tmp_path / "plain")
    assert run(Settings(tmp_path / "plain", (str(pictures / "p[0].png"),), json=True, top=1)) == 0
    best = own(pictures / "p[0].png")[0][0]
    assert json.loads(capsys.readouterr().out)[0]["predictions"][0]["class"] == str(LABELS.index(best))


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"json": True, "csv": True}, "--json, --csv and --out"),
        ({"top": 0}, "--top is 0"),
        ({"batch": 0}, "--batch is 0"),
        ({"pictures": ()}, "no pictures were named"),
        ({"checkpoint": Checkpoint(device="nonsense")}, "--device nonsense"),
    ],
)
def test_settings_that_make_no_sense(weights: Path, settings: dict[str, object], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        run(Settings(**{"weights": weights, "pictures": ("a.png",), **settings}))  # type: ignore[arg-type]
