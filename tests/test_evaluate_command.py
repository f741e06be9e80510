"""`vitrail evaluate`, and the evaluation behind it, on one process and on several."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Nursery

from vitrail.commands.evaluate import Settings, choose, run
from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.data import splits
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights.native import save

LABELS = ("zebra", "ant", "bee")


def small(labels: tuple[str, ...] = LABELS) -> Classifier:
    model = ClassifierConfig(ViTConfig(32, 1, 2, 64, (8, 8), (16, 16)), len(LABELS)).build(seed=3)
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


def draw(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            image.save(folder / name / f"{number}.png")
    return folder


def own(folder: Path, names: tuple[str, ...] = LABELS) -> tuple[float, dict[str, int]]:
    """Top-1 in per cent and how often each class is right, asked of the model picture by picture."""
    hits = dict.fromkeys(names, 0)
    files = sorted(folder.glob("*/*.png"))
    for file in files:
        pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None]
        with torch.no_grad():
            hits[file.parent.name] += names[int(small()(pixels).argmax())] == file.parent.name
    return 100 * sum(hits.values()) / len(files), hits


def ask(capsys: pytest.CaptureFixture[str], weights: Path, data: Path | str, **settings: object) -> dict[str, object]:
    capsys.readouterr()
    assert run(Settings(weights, str(data), json=True, workers=0, **settings)) == 0  # type: ignore[arg-type]
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("batch", [1, 7, 128])
def test_classes_are_matched_by_name(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], batch: int
) -> None:
    """The folder sorts ant, bee, zebra; the model has zebra first."""
    data = draw(tmp_path / "data", {"ant": 5, "bee": 9, "zebra": 3})
    found = ask(capsys, weights, data, batch=batch)
    accuracy, hits = own(data)
    assert found["count"] == 17
    assert found["split"] == "all pictures"
    assert found["unreadable"] == []
    rows = {row["name"]: row for row in found["rows"]}  # type: ignore[attr-defined]
    assert rows["top-1"]["value"] == pytest.approx(accuracy, rel=1e-12)
    assert rows["top-1"]["count"] == 17
    assert rows["top-1"]["low"] < accuracy < rows["top-1"]["high"]
    per_class = {c["class"]: c for c in found["per_class"]}  # type: ignore[attr-defined]
    assert list(per_class) == list(LABELS)
    for name, count in (("ant", 5), ("bee", 9), ("zebra", 3)):
        assert per_class[name]["count"] == count
        assert per_class[name]["recall"] == pytest.approx(hits[name] / count)
    assert np.sum(found["confusion"]) == 17
    assert sum(b["count"] for b in found["calibration"]) == 17  # type: ignore[attr-defined]


def test_some_classes_may_be_missing(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = draw(tmp_path / "data", {"bee": 4})
    found = ask(capsys, weights, data)
    accuracy, _ = own(data)
    rows = {row["name"]: row["value"] for row in found["rows"]}  # type: ignore[attr-defined]
    assert rows["top-1"] == rows["macro accuracy"] == pytest.approx(accuracy)


def test_unknown_classes_are_named(weights: Path, tmp_path: Path) -> None:
    data = draw(tmp_path / "data", {"bee": 2, "wasp": 2, "yak": 1})
    with pytest.raises(
        UserError, match=r"classes that the checkpoint does not know \(wasp, yak\); it knows zebra, ant"
    ):
        run(Settings(weights, str(data)))


def test_unreadable_pictures_are_counted(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = draw(tmp_path / "data", {"ant": 5, "bee": 4})
    (data / "ant" / "bad.png").write_text("no picture")
    found = ask(capsys, weights, data, batch=4)
    assert found["count"] == 9
    assert [Path(one["name"]).name for one in found["unreadable"]] == ["bad.png"]  # type: ignore[attr-defined]
    for file in data.rglob("*.png"):
        file.write_text("no picture")
    with pytest.raises(UserError, match=r"None of the 10 pictures"):
        run(Settings(weights, str(data), workers=0))


def test_the_table_says_it_in_human_numbers(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = draw(tmp_path / "data", {"ant": 5, "bee": 9})
    assert run(Settings(weights, str(data), workers=0)) == 0
    said = capsys.readouterr().out
    assert f"{own(data)[0]:.2f} % [" in said
    assert "] of 14" in said
    assert "macro accuracy" in said
    assert "unreadable" in said
    assert [line.split()[:2] for line in said.splitlines()[-2:]] == [["ant", "5"], ["bee", "9"]]


def test_which_pictures_are_measured(weights: Path, tmp_path: Path) -> None:
    data = draw(tmp_path / "data" / "train", {"ant": 5, "bee": 9}).parent
    assert choose(str(data), "", weights)[1] == "all pictures"
    draw(data / "val", {"ant": 2, "bee": 1}, 1)
    assert choose(str(data), "", weights)[1] == "validation"
    draw(data / "test", {"ant": 1, "bee": 1}, 2)
    source, what, _ = choose(str(data), "", weights)
    assert (what, len(source)) == ("test", 2)
    source, what, _ = choose(str(data), "train", weights)
    assert (what, len(source)) == ("train", 14)


def test_a_run_is_measured_on_what_it_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = draw(tmp_path / "data", {"ant": 20, "bee": 30})
    save(small(), tmp_path / "run" / "model.safetensors")
    held = splits.open_data(str(data), validation=0.2, seed=7, record=tmp_path / "run" / "split.json").validation
    assert held is not None
    for weights in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        source, what, _ = choose(str(data), "", weights)
        assert what == "validation (held out by the run)"
        assert [source[i].name for i in range(len(source))] == [held[i].name for i in range(len(held))]
        assert len(choose(str(data), "train", weights)[0]) == 40
        assert choose(str(data), "validation", weights)[0].fingerprint == held.fingerprint
    assert ask(capsys, tmp_path / "run", data)["count"] == 10
    # Other data were never seen by the run.
    other = draw(tmp_path / "other", {"ant": 3, "bee": 3}, 5)
    assert choose(str(other), "", tmp_path / "run")[1] == "all pictures"
    with pytest.raises(UserError, match="has no test pictures"):
        choose(str(other), "test", tmp_path / "run")


def test_without_labels_the_order_of_the_data_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(small(labels=()), tmp_path / "plain")
    data = draw(tmp_path / "data", {"a": 3, "b": 3, "c": 3})
    rows = ask(capsys, tmp_path / "plain", data)["rows"]
    assert rows[0]["value"] == pytest.approx(own(data, ("a", "b", "c"))[0])  # type: ignore[index]
    with pytest.raises(UserError, match="names none of its 3 classes"):
        run(Settings(tmp_path / "plain", str(draw(tmp_path / "two", {"a": 3, "b": 3}))))


def test_a_model_that_is_broken_names_the_picture(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.head.output.weight.fill_(3e38)  # finite itself; its sums are not
    save(model, tmp_path / "broken")
    data = draw(tmp_path / "data", {"ant": 2, "bee": 2})
    with pytest.raises(UserError, match=r"ant/0\.png: the model's answer is not finite"):
        run(Settings(tmp_path / "broken", str(data), workers=0))


def test_pictures_without_a_label_are_named(weights: Path, tmp_path: Path) -> None:
    from vitrail.commands.evaluate import relabel
    from vitrail.commands.predict import Pictures
    from vitrail.core.types import Sample

    with pytest.raises(UserError, match=r"1 pictures of there have no label \(x\.png\)"):
        relabel(Pictures((Sample("x.png", Path("x.png")),), LABELS), LABELS, 3, "there")


WORKER = """
import json
import torch
from pathlib import Path
from vitrail.core import ranks
from vitrail.data import splits
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.transforms import Transform
from vitrail.evaluation.metrics import evaluate
from vitrail.weights.load import load

torch.set_num_threads(1)
with ranks.together(torch.device("cpu")):
    model = load(Path(WEIGHTS))
    source = splits.read(DATA)[0]["train"]
    loader = PictureLoader(source, Transform(model.preprocess), Order(len(source), 6, len(source), shuffle=False))
    tally = evaluate(model, loader, 3, device="cpu", source=source)
    rows = tally.rows(expected_count=len(source))
    if ranks.first():
        print(json.dumps([[row.value, row.count] for row in rows] + [tally.index.tolist(), tally.predicted.tolist()]))
"""


def test_two_processes_find_exactly_what_one_finds(weights: Path, tmp_path: Path) -> None:
    data = draw(tmp_path / "data", {"zebra": 5, "ant": 9, "bee": 3})
    worker = f"WEIGHTS, DATA = {str(weights)!r}, {str(data)!r}{WORKER}"
    processes = Nursery(tmp_path)
    # Each ends with a command of no weight, for a child runs one.
    _, one, _ = processes.run("--version", first=worker)
    pair = processes.together("--version", first=(worker, worker))
    assert [child.code() for child in pair] == [0, 0], [child.err.read_text() for child in pair]
    two = pair[0].out.read_text()
    found, expected = (json.loads(said.splitlines()[0]) for said in (two, one))
    assert found[-2:] == expected[-2:]
    np.testing.assert_allclose(np.array(found[:-2]), np.array(expected[:-2]), rtol=1e-6)
    assert found[0][1] == 17
