"""The walk through a forward pass: every step is one that ran, and together they are the model."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.analysis import pixels_as_words
from vitrail.analysis.pixels_as_words import pixel_costs
from vitrail.analysis.walk import walk
from vitrail.commands.explain import Settings, run
from vitrail.core.errors import UserError
from vitrail.layers.transformer import Block
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.resnet import ResNetConfig, TrunkConfig
from vitrail.models.vit import ViTConfig

TINY = ViTConfig(16, 2, 2, 32, (4, 4), (12, 20))
MODELS = {
    "plain": ClassifierConfig(TINY, 5),
    "tanh layer": ClassifierConfig(TINY, 5, hidden=7),
    "every layer": ClassifierConfig(replace(TINY, position_layers="every", registers=2), 5, "class-mean"),
    "shared": ClassifierConfig(replace(TINY, positions="learned2d", position_layers="shared"), 5, "mean"),
    "relative": ClassifierConfig(replace(TINY, positions="relative", class_token=False), 5, "mean", pool_norm=True),
    "rotary": ClassifierConfig(replace(TINY, positions="rotary", qk_norm=True, feed_forward="swiglu"), 5),
    "norm before": ClassifierConfig(replace(TINY, pre_norm=True, layer_scale=True, distillation_token=True), 5, "prefix"),
    "no positions": ClassifierConfig(replace(TINY, positions="none"), 5),
    "hybrid": ClassifierConfig(
        replace(TINY, patch=(1, 1), image=(32, 64), trunk=TrunkConfig((1, 2), 32)), 5
    ),
    "ResNet": ClassifierConfig(ResNetConfig((1, 2), image=(24, 40), root_width=32), 5, "mean"),
}  # fmt: skip


def built(config: ClassifierConfig) -> Classifier:
    model = config.build()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    return model.eval()


def pixels(model: Classifier) -> torch.Tensor:
    size = model.backbone.config.image
    return torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_steps_are_the_model(config: ClassifierConfig) -> None:
    """Their parameters are its parameters, their counted MACs those of its formula, and they end in its answer."""
    model = built(config)
    taken = walk(model, pixels(model))
    with torch.no_grad():
        torch.testing.assert_close(taken.output, model(pixels(model))[0].softmax(-1), rtol=0, atol=1e-5)
    assert (
        sum(step.parameters for step in taken.steps)
        == config.parameters()
        == sum(p.numel() for p in model.parameters())
    )
    wide = config.pooled_width
    head = wide * 5 if config.hidden is None else wide * config.hidden + config.hidden * 5
    assert sum(step.macs for step in taken.steps) == config.backbone.macs() + head
    assert all(step.seconds >= 0 for step in taken.steps)


def test_shapes_are_those_of_the_paper() -> None:
    model = built(MODELS["plain"])
    shapes = {step.name: step.shape for step in walk(model, pixels(model)).steps if step.group in ("words", "block 2")}
    assert shapes["patches, flattened"] == (15, 48)
    assert shapes["linear projection"] == (15, 16)
    assert shapes["class token"] == shapes["positions"] == shapes["residual"] == (16, 16)
    assert shapes["queries, keys, values"] == (3, 2, 16, 8)
    assert shapes["attention"] == (2, 16, 16)
    assert shapes["weighted sum"] == (2, 16, 8)
    assert shapes["MLP, hidden layer (GELU)"] == (16, 32)


def test_the_rows_are_what_is_projected() -> None:
    model = built(MODELS["plain"])
    images = model.preprocess.normalize(pixels(model))
    embedding = model.backbone.patch_embedding
    rows = torch.nn.functional.unfold(images, TINY.patch, stride=TINY.patch).mT
    by_hand = rows @ embedding.weight.flatten(1).T + embedding.bias
    torch.testing.assert_close(by_hand, embedding(images).x, rtol=0, atol=1e-5)


def test_a_backbone_alone_ends_in_its_tokens() -> None:
    model = built(MODELS["plain"])
    taken = walk(model.backbone, pixels(model))
    assert taken.output.shape == (16, 16)
    assert taken.steps[-1].name == "last norm"


def test_an_attention_pool_and_an_embedding() -> None:
    pool = built(ClassifierConfig(TINY, 5, "attention"))
    assert sum(step.parameters for step in walk(pool, pixels(pool)).steps) == pool.config.parameters()
    tower = built(ClassifierConfig(TINY, 16, head="none", output="embedding"))
    with torch.no_grad():
        torch.testing.assert_close(walk(tower, pixels(tower)).output, tower(pixels(tower))[0])


def test_pixels_as_words_cost_what_the_formula_says() -> None:
    """4 t d^2 + 2 t^2 d + 2 t d m a block, and the projection of 3 numbers a pixel; the paper's 224 x 224 = 50,176 words."""
    config = ViTConfig(16, 2, 2, 32, (16, 16))
    costs = pixel_costs(config.build().eval(), (224, 224), budget=0.05)
    own, whole = costs[0], costs[-1]
    assert (own.words, own.tokens, own.measured) == ("patches", 197, True)
    t, d, m = 224 * 224 + 1, 16, 32
    assert whole.tokens == t == 50_177
    assert whole.macs == 2 * (4 * t * d * d + 2 * t * t * d + 2 * t * d * m) + (t - 1) * 3 * d
    assert whole.map_bytes == 4 * 2 * t * t
    assert not whole.measured
    assert whole.seconds > own.seconds
    small = [cost for cost in costs[1:] if cost.measured]
    assert small[0].tokens == 16 * 16 + 1
    assert own.macs == config.macs()


def test_pixels_as_words_are_timed_with_the_bias_that_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(TINY, positions="relative", image=(32, 32)).build().eval()
    given = []
    forward = Block.forward
    monkeypatch.setattr(
        Block, "forward", lambda self, x, positions: given.append(positions) or forward(self, x, positions)
    )
    costs = pixel_costs(model, (32, 32))
    assert [cost.tokens for cost in costs] == [65, 257, 1025]
    assert len(given) >= 3
    assert all(positions.bias is not None for positions in given)
    monkeypatch.setattr(pixels_as_words, "MOST_BIAS", 4 * 2 * 256 * 31 * 31)
    assert [cost.measured for cost in pixel_costs(model, (32, 32))] == [True, True, False]


class Reader(HTMLParser):
    """What a page asks for, and whether its elements close."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.asked += [value for name, value in attrs if name in ("src", "href") and value]
        self.tags.append(tag)
        if tag not in ("meta", "img", "image", "line", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("image", "line"):
            assert self.open.pop() == tag, tag


def photo(folder: Path, name: str = "a<b>.png") -> Path:
    ramp = np.add.outer(np.arange(50), np.arange(70))[..., None] * np.array([1, 2, 3])
    Image.fromarray((ramp % 256).astype(np.uint8)).save(folder / name)
    return folder / name


def saved(folder: Path, config: ClassifierConfig) -> Path:
    model = built(config)
    model.labels = ("cat", "dog", "<i>fox</i>", "owl", "elk")
    vitrail.save(model, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize("name", ["plain", "hybrid", "ResNet", "relative"])
def test_explain_writes_one_page_that_asks_for_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, out = saved(tmp_path, MODELS[name]), tmp_path / "deep" / "page.html"
    assert run(Settings(weights, str(photo(tmp_path)), out)) == 0
    said = capsys.readouterr().out
    assert "softmax" in said
    assert f"{MODELS[name].parameters():,}" in said
    assert ("With pixels as words" in said) == (name != "ResNet")
    page = out.read_text()
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    assert all(place.startswith("data:image/") for place in reader.asked)
    assert "url(" not in page
    assert "&lt;i&gt;fox" in page
    assert "a&lt;b&gt;.png" in page
    assert "<i>fox" not in page
    assert reader.tags.count("text") == (
        0 if name == "ResNet" else MODELS[name].backbone.tokens() - (name != "relative")
    )
    assert "prefers-color-scheme: dark" in page
    if name == "plain":
        assert "softmax(q k^T / sqrt(D_h))" in page
        assert "15 rows of 48 numbers" in page
        assert "patches of 4 x 4 pixels" in page
    if name == "hybrid":
        channels = MODELS[name].backbone.trunk.channels
        assert f"a map of 4 x 8 cells of {channels} numbers" in page
        assert "32 words of 1 x 1 cells, read row by row." in page
        assert f"more than its 8 x 8 pixels. Flattened, they are 32 rows of {channels} numbers" in page
    if name != "ResNet":
        assert "those from its 98th percentile on" in page


def test_explain_as_json_for_a_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path, MODELS["plain"])
    assert run(Settings(weights, str(photo(tmp_path)), tmp_path / "page.html", top=2, json=True)) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["predictions"]) == 2
    assert found["steps"][0]["shape"] == [50, 70, 3]
    assert sum(step["parameters"] for step in found["steps"]) == MODELS["plain"].parameters()


def test_explain_unfolds_the_layers_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path, MODELS["plain"])
    run(Settings(weights, str(photo(tmp_path)), tmp_path / "page.html", layers=(-1,)))
    said = capsys.readouterr().out
    assert re.search(r"block 1 +16 x 16", said)
    assert said.count("weighted sum") == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": (3,)}, "--layers 3: there is no such block; the model's are 1 to 2"),
        ({"layers": (0,)}, "--layers 0: there is no such block"),
        ({"top": 0}, "--top is 0"),
        ({"size": (13, 20)}, "does not divide into patches"),
        ({"size": (1, 2, 3)}, "--size 1 2 3 is no size"),
        ({"picture": "nowhere.jpg"}, "nowhere.jpg does not exist"),
        ({"picture": "{folder}/broken.png"}, "broken.png"),
        ({"picture": "{folder}"}, "takes one"),
        ({"out": "broken.png/page.html"}, "page.html cannot be written (File exists)"),
        ({"out": "broken.png/deep/page.html"}, "page.html cannot be written (Not a directory)"),
        ({"out": "."}, "is a folder; give a file, as"),
    ],
)
def test_bad_input_is_a_sentence(changes: dict, sentence: str, tmp_path: Path) -> None:
    weights = saved(tmp_path, MODELS["plain"])
    good = photo(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    changes = {name: value.format(folder=tmp_path) if name == "picture" else value for name, value in changes.items()}
    if "out" in changes:
        changes["out"] = tmp_path / changes["out"]
    with pytest.raises(UserError, match=re.escape(sentence)):
        run(Settings(**{"weights": weights, "picture": str(good), "out": tmp_path / "page.html", **changes}))
