"""ImageNet's family: the owners' layouts, and the counting of ReaL, V2, A, R, Sketch and ObjectNet.

The model's logits are a function of a picture's first pixel alone, so that every expected number can be worked out here.
"""

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Nursery

from vitrail.commands.evaluate import Settings, choose, counting, run
from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.data import splits
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.transforms import Transform
from vitrail.evaluation import suites
from vitrail.evaluation.metrics import Tally
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights import labels
from vitrail.weights.native import save

IDS, NAMES = labels.imagenet1k_ids(), labels.imagenet1k()


def picture(file: Path, red: int, border: int = 0) -> None:
    """Flat, but for noise-free channels that tell pictures apart; `border` pixels of another colour around it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((16 + 2 * border, 16 + 2 * border, 3), 255, np.uint8)
    inner = pixels[border : border + 16, border : border + 16]
    inner[:], inner[..., 0] = 40, red
    Image.fromarray(pixels).save(file, format="PNG")


@functools.cache
def model(names: tuple[str, ...] = NAMES) -> Classifier:
    made = ClassifierConfig(ViTConfig(32, 1, 2, 64, (8, 8), (16, 16)), 1000).build(seed=1)
    with torch.no_grad():
        made.head.output.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    made.labels, made.preprocess = names, Preprocess((16, 16))
    return made.eval()


@functools.cache
def logits(red: int) -> np.ndarray:
    pixels = torch.full((1, 3, 16, 16), 40, dtype=torch.uint8)
    pixels[:, 0] = red
    with torch.no_grad():
        return model()(pixels)[0].numpy()


def counted(
    spec: str, truth: suites.Truth = "original", batch: int = 3, names: tuple[str, ...] = NAMES
) -> tuple[suites.Suite, Tally]:
    settings = Settings(Path("nowhere"), spec, labels=truth)
    found, _, _ = choose(spec, "", Path("nowhere"))
    suite = counting(settings, model(names), found)
    count = len(suite.source)
    order = Order(count, min(batch, count), count, shuffle=False)
    loader = PictureLoader(suite.source, Transform(Preprocess((16, 16))), order)
    return suite, suite.measure(model(names), loader, device=torch.device("cpu"))


def place(red: int, right: list[int], among: list[int] | None = None) -> int:
    """How many classes the model puts before the first of the right ones."""
    values = logits(red)
    columns = list(range(1000)) if among is None else sorted(among)
    order = sorted(columns, key=lambda column: (-values[column], column))
    return min(order.index(column) for column in right)


@pytest.mark.parametrize("batch", [1, 4, 50])
def test_real_counts_any_right_class(tmp_path: Path, batch: int) -> None:
    """Real ReaL labels, of pictures with one, several and no right classes; flat validation pictures, no ground truth."""
    answers = labels.real()
    several = [number for number in range(60) if len(answers[number]) > 2][:3]
    none = [number for number in range(50_000) if not answers[number]][:2]
    numbers = sorted({0, 1, 2, 4, 5, *several, *none})
    for number in numbers:
        picture(tmp_path / "val" / f"ILSVRC2012_val_{number + 1:08}.JPEG", (number * 7) % 256)
    suite, tally = counted(f"imagenet:{tmp_path}", "real", batch)
    known = [number for number in numbers if answers[number]]
    assert tally.count == len(known) < len(numbers)
    assert tally.rank.tolist() == [place((number * 7) % 256, list(answers[number])) for number in known]
    assert [row.name for row in suite.rows(tally, len(known))] == ["top-1", "top-5"]
    assert f"{len(numbers) - len(known)} of {len(numbers)} pictures have no right class" in suite.notes[0]
    with pytest.raises(UserError, match=rf"{len(numbers)} pictures of imagenet:\S+ have no label; put the devkit's"):
        counted(f"imagenet:{tmp_path}")


def test_imagenet_by_folders_by_kaggle_and_by_devkit(tmp_path: Path) -> None:
    from scipy.io import savemat

    for number, identity in enumerate(IDS[:6]):
        picture(tmp_path / f"folders/train/{identity}/{identity}_1.JPEG", number)
        picture(tmp_path / f"folders/val/{identity}/ILSVRC2012_val_{number + 1:08}.JPEG", number)
        picture(tmp_path / f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_{number + 1:08}.JPEG", number)
    found, _ = splits.read(f"imagenet:{tmp_path / 'folders'}")
    assert found["train"].classes == found["test"].classes == IDS[:6]
    _, by_folder = counted(f"imagenet:{tmp_path / 'folders'}")
    assert by_folder.rank.tolist() == [place(number, [number]) for number in range(6)]
    assert counted(f"imagenet:{tmp_path / 'folders/val'}")[1].rank.tolist() == by_folder.rank.tolist()
    assert counted(f"imagenet:{tmp_path / 'folders'}", "real")[1].count == sum(bool(labels.real()[i]) for i in range(6))
    # Kaggle's list is in no order, and gives boxes behind the class.
    listed = [f"ILSVRC2012_val_{n + 1:08},{IDS[n]} 85 1 499 272 {IDS[n]} 1 2 3 4" for n in (3, 0, 5, 1, 4, 2)]
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(listed) + "\n")
    assert counted(f"imagenet:{tmp_path}")[1].rank.tolist() == by_folder.rank.tolist()
    (tmp_path / "LOC_val_solution.csv").unlink()
    # The devkit numbers its classes in an order of its own, with more synsets than classes behind them.
    own = np.random.default_rng(0).permutation(1000)
    kinds = [("ILSVRC2012_ID", object), ("WNID", object)]
    rows = [[(np.array([[number + 1]]), IDS[own[number]])] for number in range(1000)]
    synsets = np.array([*rows, [(np.array([[1001]]), "n00001740")]], kinds)
    data = tmp_path / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": synsets})
    order = {int(place): number + 1 for number, place in enumerate(own)}
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{order[n]}\n" for n in range(6)))
    assert counted(f"imagenet:{tmp_path}")[1].rank.tolist() == by_folder.rank.tolist()


def test_v2_folders_are_numbers(tmp_path: Path) -> None:
    """2 comes before 10, and a folder's number is the class; V2's archive holds one folder that holds them."""
    reds = {2: 3, 10: 90, 11: 140, 100: 200, 999: 250}
    for label, red in reds.items():
        picture(tmp_path / f"imagenetv2-matched-frequency-format-val/{label}/a.jpeg", red)
    suite, tally = counted(f"imagenet-v2:{tmp_path}")
    assert [IDS.index(suite.source.classes[label]) for label in tally.true] == list(reds)
    assert tally.rank.tolist() == [place(red, [label]) for label, red in reds.items()]
    (tmp_path / "cats").mkdir()
    (tmp_path / "imagenetv2-matched-frequency-format-val").rename(tmp_path / "cats/inner")
    picture(tmp_path / "cats/inner/seven/a.png", 3)
    with pytest.raises(UserError, match="not called by numbers from 0 to 999"):
        counted(f"imagenet-v2:{tmp_path}")


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_restricted_to_the_200(tmp_path: Path, name: str) -> None:
    chosen = sorted(np.random.default_rng(1).choice(1000, 200, replace=False).tolist())
    for number, label in enumerate(chosen):
        picture(tmp_path / IDS[label] / "0.jpg", number)
    suite, tally = counted(f"{name}:{tmp_path}", batch=64)
    assert len(suite.source.classes) == tally.classes == 200
    assert tally.rank.tolist() == [place(number, [label], chosen) for number, label in enumerate(chosen)]
    assert tally.rank.max() < 200
    assert suite.notes == ()
    (tmp_path / IDS[chosen[0]] / "0.jpg").unlink()
    assert "has 199 classes of the 200" in counted(f"{name}:{tmp_path}", batch=64)[0].notes[-1]


def test_sketch_counts_all_classes_and_models_in_another_order(tmp_path: Path) -> None:
    for number in (1, 5, 900):
        picture(tmp_path / f"sketch/{IDS[number]}/s.JPEG", number % 256)
    _, tally = counted(f"imagenet-sketch:{tmp_path}")
    expected = [place(number % 256, [number]) for number in (1, 5, 900)]
    assert tally.rank.tolist() == expected
    # Names as other libraries have them, none at all, ids, and ids in another order.
    short = tuple(name.split(",")[0].replace(" ", "_") for name in NAMES)
    for names in (short, (), IDS):
        assert counted(f"imagenet-sketch:{tmp_path}", names=names)[1].rank.tolist() == expected
    turned = (*IDS[1:], IDS[0])
    values = [logits(number % 256) for number in (1, 5, 900)]
    own = [int((v > v[turned.index(IDS[n])]).sum()) for n, v in zip((1, 5, 900), values, strict=True)]
    assert counted(f"imagenet-sketch:{tmp_path}", names=turned)[1].rank.tolist() == own
    with pytest.raises(UserError, match="classes are not ImageNet's"):
        counted(f"imagenet-sketch:{tmp_path}", names=tuple(f"thing {number}" for number in range(1000)))


def objectnet(root: Path) -> Path:
    """Four objects, one of them none of ImageNet's, one with three classes; the line numbers are ObjectNet's own."""
    own = np.random.default_rng(2).permutation(1000)  # head -> line
    lines = [""] * 1000
    for head, line in enumerate(own):
        lines[line] = f"class {head}, the {head}th"
    things = {"chair": [7, 300, 45], "tie": [13], "banana": [954]}
    mappings = {
        "folder_to_objectnet_label": {name: name.title() for name in (*things, "spatula_x")},
        "objectnet_to_imagenet_1k": {n.title(): "; ".join(lines[own[i]] for i in ids) for n, ids in things.items()},
        "pytorch_to_imagenet_2012_id": {str(head): int(line) for head, line in enumerate(own)},
    }
    (root / "mappings").mkdir(parents=True)
    for name, mapping in mappings.items():
        (root / f"mappings/{name}.json").write_text(json.dumps(mapping))
    (root / "mappings/imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    for number, name in enumerate((*things, "spatula_x")):
        for each in range(2):
            picture(root / f"images/{name}/{each}.png", 30 * number + each, border=2)
    return root


def test_objectnet(tmp_path: Path) -> None:
    """The border is cut off (it is white, and would change every logit); a class counts if it maps to the object."""
    root = objectnet(tmp_path / "objectnet-1.0")
    found, notes = splits.read(f"objectnet:{tmp_path}")
    assert found["test"].classes == ("banana", "chair", "tie")
    assert "3 of its 4 objects are ImageNet's, with 6 of 8 pictures" in notes[-1]
    pixels = found["test"][0].picture
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (16, 16, 3)
    suite, tally = counted(f"objectnet:{tmp_path}", batch=4)
    things = [("banana", 2, [954]), ("chair", 0, [7, 300, 45]), ("tie", 1, [13])]
    assert tally.rank.tolist() == [place(30 * number + each, right) for _, number, right in things for each in range(2)]
    assert [row.name for row in suite.rows(tally, 6)] == ["top-1", "top-5"]
    (root / "mappings/imagenet_to_label_2012_v2").unlink()
    with pytest.raises(UserError, match="imagenet_to_label_2012_v2 is missing; ObjectNet comes with it"):
        counted(f"objectnet:{tmp_path}")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(model(), tmp_path / "model")
    for number in range(3):
        picture(tmp_path / f"val/{IDS[number]}/ILSVRC2012_val_{number + 1:08}.JPEG", number)
    asked = Settings(tmp_path / "model", f"imagenet:{tmp_path / 'val'}", json=True, workers=0)
    assert run(asked) == 0
    original = json.loads(capsys.readouterr().out)
    assert original["count"] == 3
    assert {row["name"] for row in original["rows"]} >= {"top-1", "top-5", "macro accuracy"}
    assert run(replace(asked, labels="real")) == 0
    real = json.loads(capsys.readouterr().out)
    assert (real["labels"], real["count"]) == ("real", sum(bool(labels.real()[n]) for n in range(3)))
    assert "confusion" not in real
    for spec, said in (
        (f"imagenet-a:{tmp_path / 'val'}", "imagenet-a has none of them"),
        ("sample:fashion", "says nothing of them"),
    ):
        with pytest.raises(UserError, match=said):
            run(replace(asked, data=spec, labels="real"))
    with pytest.raises(UserError, match="has no training pictures, only test"):
        splits.open_data(asked.data)


def test_two_processes_count_as_one_does(tmp_path: Path) -> None:
    """The command in two processes: ReaL's labels, a picture without a right class, one that cannot be read."""
    save(model(), tmp_path / "model")
    none = next(number for number in range(50_000) if not labels.real()[number])
    for number in (*range(6), none):
        picture(tmp_path / f"val/ILSVRC2012_val_{number + 1:08}.JPEG", number % 256)
    (tmp_path / "val/ILSVRC2012_val_00000009.JPEG").write_bytes(b"none")
    asked = [
        "evaluate",
        str(tmp_path / "model"),
        "--data",
        f"imagenet:{tmp_path / 'val'}",
        "--labels",
        "real",
        "--json",
    ]
    asked += ["--workers", "0", "--batch", "2"]
    processes = Nursery(tmp_path)
    code, said, error = processes.run(*asked)
    assert code == 0, error
    pair = processes.together(*asked)
    assert [child.code() for child in pair] == [0, 0], [child.err.read_text() for child in pair]
    one, two = json.loads(said), json.loads(pair[0].out.read_text())
    assert one == two
    assert one["count"] == sum(bool(labels.real()[number]) for number in range(6))
    assert [row["name"] for row in one["unreadable"]] == [str(tmp_path / "val/ILSVRC2012_val_00000009.JPEG")]
