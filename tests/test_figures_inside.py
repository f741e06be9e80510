"""Filters, positions, tokens and the data set's plane; the figures of them; and the command that draws them all."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import folder
from PIL import Image

import vitrail
from vitrail.analysis.data_map import neighbours_alike, plane
from vitrail.analysis.figures_inside import Pane, class_colours, heat, masked, panes, save_both
from vitrail.analysis.filters import filter_components
from vitrail.analysis.gallery import FIGURES, Subject, brightened
from vitrail.analysis.internals import trace
from vitrail.analysis.position_similarity import position_similarity, structure
from vitrail.analysis.tokens import token_colours, token_similarity
from vitrail.commands.figures import Settings, run
from vitrail.core.errors import UserError
from vitrail.layers.attention import rotate
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.resnet import ResNetConfig, TrunkConfig
from vitrail.models.vit import ViT, ViTConfig

TINY = ViTConfig(16, 3, 2, 32, (4, 4), (12, 20))
RESNET = ClassifierConfig(ResNetConfig((1, 1), image=(32, 32), root_width=32), 3, "mean")


def cosine(rows: np.ndarray) -> np.ndarray:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


def test_filters_are_scikit_learns_principal_components() -> None:
    from sklearn.decomposition import PCA

    model = ViTConfig(32, 1, 2, 8, (4, 4), (8, 8)).build()
    components, shares = filter_components(model, 5)
    theirs = PCA().fit(model.patch_embedding.weight.detach().flatten(1).double().numpy())
    np.testing.assert_allclose(shares[:31], theirs.explained_variance_ratio_[:31], atol=1e-9)
    assert components.shape == (5, 3, 4, 4)
    alike = np.abs((components.reshape(5, -1) * theirs.components_[:5]).sum(1))
    np.testing.assert_allclose(alike, 1, atol=1e-6)
    flat = components.reshape(5, -1)
    assert (flat[np.arange(5), np.abs(flat).argmax(1)] > 0).all()
    assert shares.sum() == pytest.approx(1)
    assert filter_components(RESNET.build().backbone)[0].shape[1:] == (3, 7, 7)
    hybrid = replace(TINY, patch=(1, 1), trunk=TrunkConfig((), 32)).build()
    assert filter_components(hybrid)[0].shape[1:] == (3, 7, 7)


def test_position_similarity_of_a_table_of_another_width_than_height() -> None:
    model = TINY.build()
    alike = position_similarity(model)
    assert alike.unit == "cosine similarity"
    expected = cosine(model.position_embedding.grid.detach().double().numpy().reshape(15, 16)).reshape(3, 5, 3, 5)
    np.testing.assert_allclose(alike.values, expected, atol=1e-9)


def test_position_similarity_of_two_tables() -> None:
    model = replace(TINY, positions="learned2d", registers=2).build()
    table = model.position_embedding
    rows, columns = table.rows.detach().double().numpy(), table.columns.detach().double().numpy()
    codes = np.array([[*columns[x], *rows[y]] for y in range(3) for x in range(5)])
    np.testing.assert_allclose(position_similarity(model).values, cosine(codes).reshape(3, 5, 3, 5), atol=1e-9)


def test_position_similarity_of_sines_from_their_formula() -> None:
    model = replace(TINY, positions="sincos2d").build()
    frequencies = 10_000.0 ** -(np.arange(4) / 3)
    codes = [
        [*np.sin(x * frequencies), *np.cos(x * frequencies), *np.sin(y * frequencies), *np.cos(y * frequencies)]
        for y in range(3)
        for x in range(5)
    ]
    np.testing.assert_allclose(
        position_similarity(model).values, cosine(np.array(codes)).reshape(3, 5, 3, 5), atol=1e-6
    )


def test_position_similarity_of_the_block_asked_for() -> None:
    model = replace(TINY, position_layers="every").build()
    for layer in (0, 2):
        table = model.position_embedding[layer].grid.detach().double().numpy().reshape(15, 16)
        np.testing.assert_allclose(position_similarity(model, layer).values.reshape(15, 15), cosine(table), atol=1e-9)


def test_rotary_similarity_is_what_happens_to_the_product_of_equal_vectors() -> None:
    """Over many random vectors, turned as the model turns queries and keys, products change by this factor in the mean."""
    model = replace(TINY, positions="rotary").build()
    alike = position_similarity(model).values.reshape(15, 15)
    tokens = model.tokenize(torch.zeros(1, 3, 12, 20))
    x = torch.randn(4000, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 15, -1)
    turned = rotate(x, *model.positions(tokens).rotary)
    products = torch.einsum("bhqe,bhke->qk", turned, turned) / torch.einsum("bhqe,bhqe->q", x, x)[:, None]
    np.testing.assert_allclose(alike, products.numpy(), atol=0.05)
    np.testing.assert_allclose(np.diag(alike), 1, atol=1e-6)


def test_relative_similarity_is_the_mean_of_the_biases() -> None:
    """From the table by hand: the query's product with the embedding of each difference, over sqrt(e) (appendix D.4)."""
    model = replace(TINY, positions="relative", depth=2).build()
    with torch.no_grad():
        model.position_embedding.offsets.normal_(generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(1))
    of = trace(model, images)
    expected = np.zeros((15, 15))
    offsets = model.position_embedding.offsets.detach().numpy().reshape(-1, 2, 8)
    with torch.no_grad():
        for layer in range(2):
            block = of.block(layer)
            query = block.attention.project(block.attention_norm(of.given(layer)))[0].numpy()[:, :, 1:]
            for i in range(15):
                for j in range(15):
                    products = (query[:, :, i] * offsets[i - j + 14][None]).sum(-1) / np.sqrt(8)
                    expected[i, j] += products.mean() / 2
    found = position_similarity(model, of=of)
    assert found.unit == "mean bias (logits)"
    np.testing.assert_allclose(found.values.reshape(15, 15), expected, atol=1e-5)


def test_without_positions_there_is_nothing_to_compare() -> None:
    with pytest.raises(UserError, match="the model has no positions"):
        position_similarity(replace(TINY, positions="none").build())


def test_structure_finds_rows_and_columns_and_nearness() -> None:
    y, x = np.divmod(np.arange(64), 8)
    lines = ((y[:, None] == y) | (x[:, None] == x)).astype(float).reshape(8, 8, 8, 8)
    found = structure(lines)
    assert found.lines == pytest.approx(1)
    assert found.elsewhere == pytest.approx(0)
    near = -np.hypot(y[:, None] - y, x[:, None] - x).reshape(8, 8, 8, 8)
    assert structure(near).nearness == pytest.approx(1)
    assert abs(structure(near).lines - structure(near).elsewhere) < 0.05 * abs(structure(near).lines)
    chance = np.random.default_rng(0).normal(size=(8, 8, 8, 8))
    assert abs(structure(chance).nearness) < 0.1
    assert np.isnan(structure(np.zeros((1, 4, 1, 4))).elsewhere)


def test_token_similarity_and_colours() -> None:
    tokens = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    found = token_similarity(tokens, (4, 0))
    np.testing.assert_allclose(found[1], cosine(tokens[1].double().numpy())[[4, 0]], atol=1e-6)
    random = np.random.default_rng(0)
    along = random.normal(size=(3, 40, 1)) * np.array([9.0, 0, 0, 0]) + random.normal(size=(3, 40, 4)) * 0.01
    colours, shares = token_colours(torch.tensor(along, dtype=torch.float32))
    assert colours.shape == (3, 40, 3)
    assert colours[..., 0].min() == 0
    assert colours[..., 0].max() == 255
    assert shares[0] > 0.99
    order = np.corrcoef(np.abs(np.argsort(np.argsort(along[..., 0].ravel()))), colours[..., 0].ravel())[0, 1]
    assert abs(order) > 0.95


def test_the_plane_keeps_groups_together_and_is_the_same_again() -> None:
    random, labels = np.random.default_rng(0), np.repeat([0, 1, 2], 20)
    features = random.normal(size=(60, 8)) + 6 * np.eye(8)[labels]
    where = plane(features, seed=1)
    assert neighbours_alike(where, labels) > 0.95
    np.testing.assert_array_equal(where, plane(features, seed=1))
    assert neighbours_alike(random.normal(size=(60, 2)), labels) < 0.6
    with pytest.raises(UserError, match="at least 10 pictures, not 3"):
        plane(features[:3])


def test_without_scikit_learn_the_plane_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(UserError, match="needs scikit-learn"):
        plane(np.zeros((12, 3)))


def test_a_rollout_is_multiplied_onto_the_picture() -> None:
    picture = np.full((8, 8, 3), 200, np.uint8)
    assert (masked(picture, np.ones((2, 2))) == 200).all()
    half = masked(picture, np.array([[0.0, 0.0], [1.0, 1.0]]))
    assert half[0].max() == 0
    assert half[-1].min() == 200


def test_heat_and_class_colours() -> None:
    shown = heat(np.array([[0.0, 1.0]]))
    assert shown[0, 0].sum() < 20
    assert shown[0, 1].sum() > 500
    assert len(set(class_colours(10))) == 10
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in class_colours(100))


def subject(config: ClassifierConfig, count: int = 3) -> Subject:
    model = config.build().eval()
    with torch.no_grad():
        model.head.output.weight.normal_(generator=torch.Generator().manual_seed(0))
    size = config.backbone.image
    pixels = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Subject(model, "tiny", pixels, shown=2)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_axes_a_caption_and_both_files(name: str, tmp_path: Path) -> None:
    drawn = FIGURES[name](subject(ClassifierConfig(TINY, 3)))
    json.dumps(drawn.numbers)
    png, svg = save_both(drawn.figure, tmp_path / name)
    with Image.open(png) as image:
        assert image.mode == "RGBA"
        assert image.getpixel((0, 0))[3] == 0
    text = drawn.figure.get_supxlabel()
    assert text.replace("\n", " ") == drawn.caption
    assert any(axis.get_xlabel() and (axis.get_ylabel() or axis.get_yticks().size) for axis in drawn.figure.axes)
    ElementTree.parse(svg)


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (
        [
            path.read_bytes()
            for path in save_both(FIGURES["distance"](subject(ClassifierConfig(TINY, 3))).figure, tmp_path / "d")
        ]
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("name", ["positions", "distance", "attention", "rollout", "gradient"])
def test_a_resnet_has_no_attention(name: str) -> None:
    with pytest.raises(UserError, match="a ResNet has no attention"):
        FIGURES[name](subject(RESNET))


@pytest.mark.parametrize("name", ["filters", "similarity", "colours"])
def test_what_a_resnet_has_is_drawn(name: str) -> None:
    assert FIGURES[name](subject(RESNET)).caption


def test_maps_lie_where_their_patches_are() -> None:
    """The brightest pane of an attention figure is drawn at the patch that the map has largest."""
    of = subject(ClassifierConfig(TINY, 3))
    figure = FIGURES["attention"](replace(of, layers=(1,), heads=(0,), query=(2, 1))).figure
    picture, _, head = figure.axes[:3]
    weights = trace(of.model, of.pixels[:1]).weights(1)[0, 0, 1 + 2 * 5 + 1, 1:].reshape(3, 5)
    np.testing.assert_allclose(head.images[0].get_array(), weights / weights.max(), atol=1e-6)
    assert head.images[0].get_extent() == [0, 20, 12, 0]
    np.testing.assert_allclose(head.lines[0].get_xydata(), [[6, 10]])
    assert picture.images[0].get_array().shape == (12, 20, 3)


def test_a_ragged_table_of_panes() -> None:
    figure = panes([[Pane(np.zeros((2, 2)))] * 3, [Pane(np.ones((2, 2)))]], size=(8, 16), caption="c", scale="share")
    assert sum(axis.axison for axis in figure.axes[:6]) == 4


@pytest.mark.parametrize("size", [(28, 28), (224, 224), (1024, 1024), (462, 308)])
@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_labels_lie_within_the_figure(size: tuple[int, int], columns: int) -> None:
    table = [[Pane(np.zeros((2, 2)))] * columns] * 3
    names = ("picture", "rollout", "picture x rollout")
    figure = panes(
        table, size=size, caption="a line of words " * 9, rows=names, scale="share of the map's 98th percentile"
    )
    figure.draw_without_rendering()
    ink, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(ink.x0, ink.y0, width - ink.x1, height - ink.y1) > 0.02


def test_a_caption_says_pictures_only_where_there_were_some() -> None:
    of = subject(ClassifierConfig(replace(TINY, positions="relative"), 3))
    assert "layers and pictures" in FIGURES["positions"](of).caption
    drawn = FIGURES["positions"](replace(of, pixels=of.pixels[:0])).caption
    assert "layers and a drawn picture of ramps, squares and rings" in drawn


def test_one_odd_patch_does_not_darken_a_rollout() -> None:
    values = np.full((10, 10), 0.5)
    values[0, 0] = 100
    shown = brightened(values)
    assert shown.max() == shown.min() == 1
    assert brightened(np.zeros((2, 2))).max() == 0


# The command


def saved(path: Path, config: ClassifierConfig | ViTConfig = TINY) -> Path:
    model = (config if isinstance(config, ClassifierConfig) else ClassifierConfig(config, 3)).build()
    model.labels = ("class0", "class1", "class2")
    vitrail.save(model, path / "model.safetensors")
    return path / "model.safetensors"


def test_the_command_draws_all_that_can_be_and_says_what_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone: ViT = TINY.build()
    vitrail.save(backbone, tmp_path / "bare.safetensors")
    data = folder(tmp_path / "data", each=2)
    out = tmp_path / "out"
    assert run(Settings(tmp_path / "bare.safetensors", (str(data),), out)) == 0
    said = capsys.readouterr()
    assert "left out: gradient: the model has no head" in said.err
    drawn = {"filters", "positions", "distance", "attention", "rollout", "similarity", "colours"}
    assert {path.name for path in out.iterdir()} == {f"{n}.{e}" for n in drawn for e in ("png", "svg")} | {
        "figures.json"
    }
    numbers = json.loads((out / "figures.json").read_text())["figures"]
    assert numbers.keys() == drawn
    assert np.array(numbers["distance"]["pixels"]).shape == (3, 2)
    assert numbers["distance"]["pictures"] == 6


def test_without_pictures_what_needs_none_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = saved(tmp_path, replace(TINY, positions="relative")), tmp_path / "out"
    assert run(Settings(weights, (), out)) == 0
    assert {path.stem for path in out.iterdir()} == {"filters", "positions", "figures"}
    assert "distance: this figure needs pictures" in capsys.readouterr().err


def test_the_map_is_one_page_with_all_thumbnails(tmp_path: Path) -> None:
    weights, data, out = saved(tmp_path), folder(tmp_path / "data", each=8), tmp_path / "out"
    (data / "class0" / "0.png").rename(data / "class0" / "<b>@side.png")
    settings = Settings(weights, (), out, which=("map",), data=str(data), points=12)
    assert run(settings) == 0
    page = (out / "map.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert "http" not in page.replace("http-equiv", "")
    assert "<b>@side" not in page
    points = json.loads(re.search(r"points = (\[\[.*?\]\]), classes", page)[1])
    assert len(points) == 12
    assert all(0 <= x <= 1 and 0 <= y <= 1 and 0 <= label < 3 for x, y, label, _ in points)
    assert {path.name for path in out.iterdir()} == {"map.png", "map.svg", "map.html", "figures.json"}


def test_a_picture_that_cannot_be_read_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path / "data", classes=1, each=2)
    (data / "class0" / "broken.png").write_bytes(b"nothing")
    assert run(Settings(saved(tmp_path), (str(data),), tmp_path / "out", which=("distance",))) == 2
    assert "broken.png" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of the pictures could be read"):
        run(Settings(saved(tmp_path), (str(data / "class0" / "broken.png"),), tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"which": ("attention",), "layers": (9,)}, "--layers 9: there is no such block; the model's are 1 to 3"),
        ({"draw_heads": (3,)}, "--draw-heads 3: there is no such head; the model's are 1 to 2"),
        ({"query": (4, 1), "which": ("attention",)}, "--query 4 1 is outside of the 3 rows and 5 columns"),
        ({"query": (0, 1), "which": ("similarity",)}, "--query 0 1 is outside of the 3 rows and 5 columns"),
        ({"classes": ("clas1",)}, "the nearest is 'class1'"),
        ({"limit": 0}, "--limit is 0"),
        ({"data": "sample:fashion"}, "give one of the two"),
        ({"which": ("map",)}, "give --data"),
        ({"pictures": ("nowhere.jpg",)}, "none of the pictures could be found"),
        ({"size": (0,)}, "--size 0 is no size"),
        ({"size": (18, 20)}, "does not divide into patches"),
        ({"out": "a file"}, "a file cannot be written (File exists)"),
        ({"out": "a file/below"}, "below cannot be written (Not a directory)"),
    ],
)
def test_bad_input_is_a_sentence(changes: dict, sentence: str, tmp_path: Path) -> None:
    weights, data = saved(tmp_path), folder(tmp_path / "data", classes=1, each=1)
    (tmp_path / "a file").touch()
    changes = {name: tmp_path / value if name == "out" else value for name, value in changes.items()}
    with pytest.raises(UserError, match=re.escape(sentence)):
        run(Settings(**{"weights": weights, "pictures": (str(data),), "out": tmp_path / "out", **changes}))


def test_a_resnet_asked_for_attention_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="distance: a ResNet has no attention"):
        run(Settings(saved(tmp_path, RESNET), (str(folder(tmp_path / "data")),), tmp_path / "o", which=("distance",)))
