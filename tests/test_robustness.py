"""The alterations and the run of `vitrail robustness`: each against a plain NumPy version, and the verb on tiny models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.analysis import adversarial, alterations, robustness, robustness_tests, textures
from vitrail.analysis.robustness import Contestant, Exam
from vitrail.cli import main
from vitrail.commands.reading import Checkpoint
from vitrail.commands.robustness import Settings, run
from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.data.sources import limit, read_sample
from vitrail.data.transforms import read
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.resnet import ResNetConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights.load import load
from vitrail.weights.native import save

LABELS = ("left", "right")
VIT = ViTConfig(width=32, depth=2, heads=2, mlp=64, patch=(8, 8), image=(32, 32))


def noise(count: int, size: tuple[int, int] = (32, 32), channels: int = 3, seed: int = 0) -> torch.Tensor:
    drawn = np.random.default_rng(seed).integers(0, 256, (count, channels, *size), dtype=np.uint8)
    return torch.from_numpy(drawn)


def bright_sides(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise whose left, or right, half is brighter."""
    pixels, labels = noise(count, seed=seed) // 2, torch.arange(count) % 2
    for picture, label in zip(pixels, labels.tolist(), strict=True):
        picture[:, :, 16 * label : 16 * label + 16] += 110
    return pixels, labels


@pytest.fixture(scope="module")
def taught() -> Classifier:
    """A tiny ViT that tells bright sides apart."""
    model = ClassifierConfig(VIT, 2).build(0)
    model.labels = LABELS
    adam = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(120):
        pixels, labels = bright_sides(64, seed=100 + step)  # never the same: 64 pictures can be learned by heart
        loss = torch.nn.functional.cross_entropy(model(pixels), labels)
        adam.zero_grad()
        loss.backward()
        adam.step()
    pixels, labels = bright_sides(64)
    assert float((model(pixels).argmax(1) == labels).float().mean()) > 0.95
    return model.eval()


def exam_of(model: Classifier, count: int = 40) -> Exam:
    pixels, labels = bright_sides(count, seed=1)
    return Exam(pixels, labels, (Contestant("tiny", model, labels),), model, (4, 4), (128, 128, 128), batch=16)


@pytest.mark.parametrize(("size", "grid"), [((32, 32), (8, 8)), ((32, 32), (14, 14)), ((30, 21), (4, 5))])
def test_drop_is_numpys(size, grid):
    pixels = noise(5, size)
    cells = alterations.random_cells([3, 0, 7, 1, 2], grid, 0.4, seed=2)
    assert (cells.flatten(1).sum(1) == round(0.4 * grid[0] * grid[1])).all()
    found = alterations.drop(pixels, cells, (1, 2, 3))
    expected = pixels.numpy().copy()
    for picture in range(5):
        for y in range(grid[0]):
            for x in range(grid[1]):
                if cells[picture, y, x]:
                    top, bottom = ((size[0] * k + grid[0] // 2) // grid[0] for k in (y, y + 1))
                    left, right = ((size[1] * k + grid[1] // 2) // grid[1] for k in (x, x + 1))
                    expected[picture, :, top:bottom, left:right] = np.array([1, 2, 3])[:, None, None]
    assert np.array_equal(found.numpy(), expected)


def test_drop_is_nested_and_the_pictures_own():
    few, many = (alterations.random_cells([4, 9], (8, 8), share, 0) for share in (0.2, 0.5))
    assert (many | ~few).all()
    assert not torch.equal(few[0], few[1])
    assert torch.equal(alterations.random_cells([9], (8, 8), 0.2, 0)[0], few[1])


def test_salient_cells_are_numpys():
    attention = torch.rand(20, 5, 7, generator=torch.Generator().manual_seed(0)) ** 3
    attention = attention / attention.sum((1, 2), keepdim=True)
    for share in (0.1, 0.35, 0.8, 0.95):
        salient = alterations.salient_cells(attention, share)
        rest = alterations.non_salient_cells(attention, 1 - share)
        assert torch.equal(rest, ~salient)
        for picture, chosen in zip(attention.double().numpy(), salient.numpy(), strict=True):
            held = 0.0
            expected = np.zeros(picture.size, bool)
            for place in np.argsort(-picture, axis=None, kind="stable"):
                if held >= share * picture.sum() - 1e-12:
                    break
                expected[place] = True
                held += picture.flat[place]
            assert np.array_equal(chosen.reshape(-1), expected)


def test_attention_on_another_grid_keeps_its_mass(taught):
    pixels = bright_sides(3)[0]
    own = alterations.attention_of_answer(taught, pixels, (4, 4))
    fine = alterations.attention_of_answer(taught, pixels, (6, 6))
    assert torch.allclose(own.sum((1, 2)), torch.ones(3))
    assert torch.allclose(fine.sum((1, 2)), torch.ones(3))
    # 6 cells on 4 patches: two cells' sum of a side is not changed by the border between them.
    assert torch.allclose(own[:, :2].sum((1, 2)), fine[:, :3].sum((1, 2)), atol=1e-6)


@pytest.mark.parametrize("grid", [(2, 2), (4, 8)])
def test_shuffle_is_numpys(grid):
    pixels = noise(3)
    found = alterations.shuffle(pixels, [5, 6, 7], grid, seed=1).numpy()
    high, wide = 32 // grid[0], 32 // grid[1]

    def cells(picture: np.ndarray) -> np.ndarray:
        return picture.reshape(3, grid[0], high, grid[1], wide).transpose(1, 3, 0, 2, 4).reshape(-1, 3 * high * wide)

    for before, after in zip(pixels.numpy(), found, strict=True):
        order = [int(np.flatnonzero((cells(before) == cell).all(1))[0]) for cell in cells(after)]
        assert sorted(order) == list(range(grid[0] * grid[1]))
        assert order != sorted(order)


def test_shuffle_of_uneven_cells_repeats_or_loses_lines_only():
    ramp = torch.arange(32, dtype=torch.uint8).expand(1, 1, 32, 32).contiguous()
    found = alterations.shuffle(ramp, [0], (1, 14), seed=0)[0, 0, 0]
    assert set(found.tolist()) <= set(range(32))
    assert not torch.equal(found, ramp[0, 0, 0])
    assert len(set(found.tolist())) >= 28  # 14 cells of 2 or 3 pixels


def test_strength_nothing_changes_nothing():
    pixels, index = noise(4), [0, 1, 2, 3]
    attention = torch.rand(4, 8, 8)
    for cells in (
        alterations.random_cells(index, (8, 8), 0.0, 0),
        alterations.salient_cells(attention, 0.0),
        alterations.non_salient_cells(attention, 0.0),
    ):
        assert torch.equal(alterations.drop(pixels, cells, (0, 0, 0)), pixels)
    assert torch.equal(alterations.shuffle(pixels, index, (1, 1), 0), pixels)
    assert torch.equal(alterations.sized(pixels, (32, 32)), pixels)
    grey = pixels[:, :1].repeat(1, 3, 1, 1)
    assert torch.equal(textures.diffused(grey, steps=0), grey)


def test_zero_colour_is_nothing_after_normalisation():
    preprocess = Preprocess(mean=(0.485, 0.456, 0.406), deviation=(0.2, 0.2, 0.2))
    pixels = torch.tensor(alterations.zero_colour(preprocess), dtype=torch.uint8).view(1, 3, 1, 1)
    assert preprocess.normalize(pixels).abs().max() <= 0.5 / 255 / 0.2 + 1e-6


def test_phases_keep_spectrum_and_mean_and_lose_places():
    pixels = (noise(2) // 4 + 96).to(torch.uint8)
    found = textures.phases(pixels, [0, 1], 0)
    before, after = (np.abs(np.fft.fft2(x.double().numpy())) for x in (pixels, found))
    assert np.corrcoef(before[..., 1:, 1:].ravel(), after[..., 1:, 1:].ravel())[0, 1] > 0.99
    assert torch.allclose(pixels.float().mean((2, 3)), found.float().mean((2, 3)), atol=0.5)
    assert abs(np.corrcoef(pixels.ravel(), found.ravel())[0, 1]) < 0.2


def test_diffusion_smooths_regions_and_keeps_edges():
    drawn = np.random.default_rng(0).normal(0, 6, (1, 3, 32, 32)) + 60
    drawn[..., 16:] += 120
    pixels = torch.from_numpy(drawn.clip(0, 255).astype(np.uint8))
    found = textures.diffused(pixels).float()
    assert found[..., :12].std() < 0.5 * textures.grey_of(pixels)[..., :12].std()
    assert found[..., 17].mean() - found[..., 14].mean() > 100


def shapes_and_textures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares and discs somewhere (a shape is no class), stripes down or across in them (a texture is one)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    pictures = []
    for number in range(count):
        top, left = random.uniform(12, 20, 2)
        inside = np.hypot(y - top, x - left) < random.uniform(7, 10)
        stripes = ((y if number % 2 else x) // 2 + random.integers(4)) % 2
        picture = np.where(inside, 60 + 130 * stripes, 30) + random.normal(0, 6, (32, 32))
        pictures.append(np.repeat(picture.clip(0, 255).astype(np.uint8)[None], 3, 0))
    return torch.from_numpy(np.stack(pictures)), torch.arange(count) % 2


def test_outlines_have_edges_but_nothing_for_small_windows():
    learn, labels = shapes_and_textures(160, 0)
    pixels, truth = shapes_and_textures(100, 1)
    local = textures.LocalClassifier(learn, labels, 2, count=32)
    assert local.right(pixels, truth).mean() > 0.95
    altered = textures.outlines(pixels, range(100), 0)
    row = robustness.row("local", local.right(altered, truth))
    assert row.low < 50 < row.high
    assert np.nanmean(textures.edge_correlation(pixels, altered)) > 0.8
    assert altered.float().mean((1, 2, 3)).std() < 3  # one grey in all of them


def few_and_many(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A disc, or four with as much area and twice the outline."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    pictures = []
    for number in range(count):
        radius, corners = (8, [(12, 12)]) if number % 2 else (4, [(8, 8), (8, 22), (22, 8), (22, 22)])
        inside = np.zeros((32, 32), bool)
        for top, left in corners:
            high, wide = random.uniform(-2, 2, 2) + (4 if radius == 8 else 0)
            inside |= np.hypot(y - top - high, x - left - wide) < radius
        picture = np.where(inside, 190, 40) + random.normal(0, 3, (32, 32))
        pictures.append(np.repeat(picture.clip(0, 255).astype(np.uint8)[None], 3, 0))
    return torch.from_numpy(np.stack(pictures)), torch.arange(count) % 2


def test_small_windows_cannot_learn_how_long_outlines_are():
    (learn, labels), (pixels, truth) = few_and_many(400, 0), few_and_many(200, 1)
    lessons, altered = textures.outlines(learn, range(200, 600), 0), textures.outlines(pixels, range(200), 0)
    row = robustness.row("local", textures.LocalClassifier(lessons, labels, 2).right(altered, truth))
    assert row.low <= 50, row
    assert np.nanmean(textures.edge_correlation(pixels, altered)) > 0.75


def test_the_adversarial_patch_is_pasted_where_it_is_said_to_be():
    pixels, patch = noise(3), noise(1, (5, 5), seed=4)[0]
    where = adversarial.places([0, 1, 2], 5, (32, 32), 0)
    found = adversarial.paste(pixels, patch, where).numpy()
    for before, after, (top, left, turns) in zip(pixels.numpy(), found, where.tolist(), strict=True):
        expected = before.copy()
        expected[:, top : top + 5, left : left + 5] = np.rot90(patch.numpy(), turns, (1, 2))
        assert np.array_equal(after, expected)


def test_an_adversarial_patch_lowers_accuracy_more_than_noise():
    model = load("vitrail:ViT-Micro/7")
    source = limit(read_sample("fashion", "test"), 60, 0)
    own = [model.labels.index(source.classes[label]) for label in source.labels]
    pixels, labels = read([sample.picture for sample in source], model.preprocess), torch.tensor(own)
    exam = Exam(pixels, labels, (Contestant("tiny", model, labels),), None, (4, 4), (128, 128, 128), batch=16)
    tests = {test.name: test for test in robustness_tests.every_test(exam, ["patch"], areas=(0.2,), patch_steps=15)}
    clean = exam.right(exam.pixels, range(60))
    curves = {name: robustness.run(exam, test, test.steps(None), clean) for name, test in tests.items()}
    made, plain = (curves[f"patch {kind}"].points[-1].row("tiny") for kind in ("against tiny", "of noise"))
    assert made.count == plain.count == 30
    assert made.value < plain.value - 20
    again = robustness.from_json(json.loads(json.dumps(robustness.to_json(curves["patch against tiny"]))))
    assert np.array_equal(again.points[-1].right["tiny"], curves["patch against tiny"].points[-1].right["tiny"])


def test_results_do_not_depend_on_the_batch(taught):
    exams = [exam_of(taught), exam_of(taught)]
    object.__setattr__(exams[1], "batch", 7)
    found = []
    for exam in exams:
        test = robustness_tests.every_test(exam, ["drop"], shares=(0.0, 0.5))[1]
        clean = exam.right(exam.pixels, range(40))
        found.append(robustness.run(exam, test, test.steps(None), clean))
    assert len(found[0].points) == 2
    assert np.array_equal(found[0].points[1].right["tiny"], found[1].points[1].right["tiny"])


@pytest.fixture(scope="module")
def files(tmp_path_factory, taught) -> Path:
    """A ViT, a ResNet, and a folder of pictures of which one cannot be read."""
    folder = tmp_path_factory.mktemp("robustness")
    rival = ClassifierConfig(ResNetConfig(layers=(1, 1), root_width=32, image=(32, 32)), 2, "mean").build(0)
    rival.labels = LABELS
    for name, model in (("vit", taught), ("resnet", rival)):
        (folder / name).mkdir()
        save(model, folder / name)
    for split, count, seed in (("train", 40, 2), ("test", 24, 3)):
        pixels, labels = bright_sides(count, seed)
        for number, (picture, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            path = folder / "data" / split / LABELS[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    (folder / "data" / "test" / "left" / "broken.png").write_bytes(b"no picture")
    return folder


def settings(files: Path, out: Path, **changed: object) -> Settings:
    given = {
        "weights": files / "vit", "data": str(files / "data"), "against": files / "resnet", "out": out,
        "shares": (0.0, 0.5), "grids": (2,), "areas": (0.1,), "patch_steps": 3, "workers": 0, "json": True,
        **changed,
    }  # fmt: skip
    return Settings(**given)  # type: ignore[arg-type]


def test_the_verb_measures_both_and_goes_on(files, tmp_path, capsys):
    assert run(settings(files, tmp_path / "out", only=("drop,shuffle", "texture", "patch", "equivariance"))) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["count"] == 24
    assert [one["name"] for one in said["unreadable"]]
    assert said["unaltered"]["vit"]["value"] > 90
    names = [curve["name"] for curve in said["curves"]]
    assert names[:4] == ["random drop", "salient drop", "non-salient drop", "shuffle"]
    assert {"patch against vit", "patch against resnet", "patch of noise"} < set(names)
    row = said["curves"][0]["points"][1]["rows"]["resnet"]
    assert row["count"] == 24
    assert row["low"] <= row["value"] <= row["high"]
    assert {one["alteration"] for one in said["local classifier and edges"]} > {"outlines", "diffused"}
    assert said["properties"]["vit"]["permutation"]["exact"] == 0
    within = said["properties"]["vit"]["attention within"]
    assert within["pixels"] == [4, 8, 16]
    assert [shares == sorted(shares) for shares in within["shares"]] == [True] * VIT.depth
    page = (tmp_path / "out" / "report.html").read_text()
    assert "the fewest that hold 50 % of the attention" in page
    assert "within 4 pixels stay" in page
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "out" / "figures" / "drop.svg").exists()
    assert (tmp_path / "out" / "figures" / "drop.png").exists()

    parts = tmp_path / "out" / "parts"
    before = {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}
    (parts / "shuffle.json").unlink()
    assert run(settings(files, tmp_path / "out", only=("drop,shuffle", "texture", "patch", "equivariance"))) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["curves"] == said["curves"]
    changed = {path.name for path in parts.iterdir() if before[path.name] != path.stat().st_mtime_ns}
    assert changed == {"shuffle.json"}


def test_a_dry_run_only_plans(files, tmp_path, capsys):
    assert run(settings(files, tmp_path / "none", dry_run=True)) == 0
    assert not (tmp_path / "none").exists()
    assert "corruptions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"only": ("dropp",)}, "the nearest is drop"),
        ({"batch": 0}, "--batch is 0"),
        ({"shares": (1.5,)}, "--shares 1.5 must be"),
        ({"grids": (1,)}, "--grids 1 must be"),
        ({"target": "up"}, "--target up is none of the classes"),
        ({"cells": 64}, "--cells 64 is more than"),
        ({"salience": "resnet"}, "has no attention; give a ViT"),
        ({"checkpoint": Checkpoint(merge="2")}, "--merge 2 changes one of them; leave it out"),
        ({"checkpoint": Checkpoint(engine="openvino")}, "robustness runs eagerly"),
        ({"checkpoint": Checkpoint(precision="int8")}, "robustness runs eagerly"),
    ],
)
def test_mistakes_are_said_in_a_sentence(files, tmp_path, changed, said):
    if "salience" in changed:
        changed = {"salience": files / changed["salience"]}
    with pytest.raises(UserError, match=said):
        run(settings(files, tmp_path / "out", **changed))


def test_small_pictures_have_no_corruptions(tmp_path):
    model = ClassifierConfig(ViTConfig(width=16, depth=1, heads=2, mlp=16, patch=(7, 7), image=(28, 28)), 2).build(0)
    model.labels = LABELS
    (tmp_path / "model").mkdir()
    save(model, tmp_path / "model")
    for number in range(8):
        path = tmp_path / "data" / LABELS[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(1, (28, 28), seed=number)[0].permute(1, 2, 0).numpy()).save(path)
    with pytest.raises(UserError, match="at least 32 pixels a side"):
        run(Settings(tmp_path / "model", str(tmp_path / "data"), only=("corruptions",), workers=0))


def test_the_verb_is_known(capsys):
    with pytest.raises(SystemExit):
        main(["robustness", "--help"])
    assert "--against" in capsys.readouterr().out
