"""Features: what is read of each kind of model, and the cache that may be interrupted, damaged and shared."""

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import folder

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess, Source
from vitrail.data.sources import subset
from vitrail.data.splits import read as read_data
from vitrail.data.transforms import read as read_pictures
from vitrail.inference import features
from vitrail.inference.features import default_cache, extract, key, reader, resolved, spoken, weights_hash
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.resnet import ResNet, ResNetConfig
from vitrail.models.vit import ViT, ViTConfig

CONFIG = ViTConfig(16, 2, 2, 32, (8, 8), (16, 16))
PREPROCESS = Preprocess((16, 16))


def backbone(**changes: object) -> ViT:
    return replace(CONFIG, **changes).build(seed=1).eval()  # type: ignore[arg-type]


def classifier(**changes: object) -> Classifier:
    return ClassifierConfig(CONFIG, 3, **changes).build(seed=1).eval()  # type: ignore[arg-type]


def resnet() -> ResNet:
    return ResNetConfig((1, 1, 1, 1), image=(32, 32)).build(seed=0).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return read_data(str(folder(tmp_path / "data", classes=2, each=10)))[0]["train"]


class TestReader:
    def test_planned_is_what_the_head_stands_on(self, images: torch.Tensor) -> None:
        for model in (
            classifier(),
            classifier(pool="mean", pool_norm=True),
            classifier(pool="attention"),
            classifier(hidden=8),
        ):
            torch.nn.init.normal_(model.head.output.weight)
            read = reader(model)
            assert torch.allclose(model.head.output(read(images)), model(images), atol=1e-6)

    def test_tokens_by_name(self, images: torch.Tensor) -> None:
        model = backbone(registers=2)
        found = model.features(images)
        assert torch.equal(reader(model)(images), found.prefix[:, 0])
        assert torch.equal(reader(model, "class")(images), found.prefix[:, 0])
        assert torch.equal(reader(model, "mean")(images), found.tokens.mean(1))
        both = reader(model, "class-mean")(images)
        assert torch.equal(both, torch.cat([found.prefix[:, 0], found.tokens.mean(1)], 1))
        # Whatever the head does.
        assert torch.equal(reader(classifier(pool="mean"), "class")(images), reader(classifier(), "planned")(images))

    def test_the_plan_without_a_class_token_is_the_mean(self, images: torch.Tensor) -> None:
        model = backbone(class_token=False)
        assert torch.equal(reader(model)(images), model.features(images).tokens.mean(1))
        net = resnet()
        large = torch.randn(2, 3, 32, 32)
        assert torch.equal(reader(net)(large), net.features(large).tokens.mean(1))
        assert resolved(net, "planned") == "mean"
        assert spoken(classifier(hidden=8), "planned") == "tanh layer before the logits"

    def test_pixels_are_normalised(self) -> None:
        pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
        model = backbone()
        assert torch.equal(reader(model)(pixels), reader(model)(model.preprocess.normalize(pixels)))

    def test_what_a_model_lacks(self) -> None:
        with pytest.raises(UserError, match="needs a class token, and this ResNet has none: give --reading mean"):
            reader(resnet(), "class")
        with pytest.raises(UserError, match="this model has none"):
            reader(backbone(class_token=False), "class-mean")
        with pytest.raises(UserError, match="tanh layer, which this model lacks"):
            reader(classifier(), "pre-logits")


class TestExtract:
    def test_each_row_is_its_picture(self, source: Source) -> None:
        """Against one picture at a time, through the public reading of pictures."""
        model = backbone()
        table = extract(model, source, PREPROCESS, batch=7, workers=0)
        assert table.index.tolist() == list(range(20))
        assert table.labels.tolist() == [0] * 10 + [1] * 10
        assert table.features.dtype == torch.float32
        with torch.no_grad():
            for place in (0, 6, 19):
                one = read_pictures([source[place].picture], PREPROCESS)
                assert torch.allclose(table.features[place], reader(model)(one)[0], atol=1e-6)

    @pytest.mark.parametrize("batch", [1, 3, 64])
    def test_the_batch_size_does_not_matter(self, source: Source, batch: int) -> None:
        model = backbone()
        whole = extract(model, source, PREPROCESS, batch=20, workers=0).features
        parted = extract(model, source, PREPROCESS, batch=batch, workers=0).features
        assert (whole - parted).abs().max() <= 1e-6 * whole.abs().max()

    def test_the_given_preprocessing_counts_and_the_mode_is_kept(self, source: Source) -> None:
        model = backbone(dropout=0.5).train()
        model.preprocess = Preprocess((16, 16), mean=(0.0,) * 3, deviation=(1.0,) * 3)
        first = extract(model, source, PREPROCESS, workers=0).features
        assert model.training
        assert torch.equal(first, extract(backbone(), source, PREPROCESS, workers=0).features)

    def test_unreadable_pictures_are_left_out_and_tried_again(self, source: Source, tmp_path: Path) -> None:
        bad = Path(str(source[3].picture))
        whole = bad.read_bytes()
        bad.write_text("no picture")
        table = extract(backbone(), source, PREPROCESS, workers=0, cache=tmp_path / "cache")
        assert list(table.problems) == [3]
        assert "3.png" in table.problems[3]
        assert 3 not in table.index.tolist()
        assert table.features.shape == (19, 16)
        bad.write_bytes(whole)
        assert extract(backbone(), source, PREPROCESS, workers=0, cache=tmp_path / "cache").problems == {}

    def test_no_picture_at_all(self, source: Source, tmp_path: Path) -> None:
        for place in range(20):
            Path(str(source[place].picture)).write_text("no picture")
        with pytest.raises(UserError, match="None of the 20 pictures could be read"):
            extract(backbone(), source, PREPROCESS, workers=0, cache=tmp_path / "cache")

    def test_features_that_are_not_finite_name_the_picture(self, source: Source) -> None:
        model = backbone()
        with torch.no_grad():
            model.encoder.norm.weight.fill_(float("inf"))
        with pytest.raises(UserError, match=r"0\.png: the model's answer is not finite"):
            extract(model, source, PREPROCESS, workers=0)


class TestCache:
    def test_a_second_time_opens_no_picture(self, source: Source, tmp_path: Path, decoded: list[str]) -> None:
        first = extract(backbone(), source, PREPROCESS, batch=8, workers=0, cache=tmp_path)
        assert len(decoded) == 20
        second = extract(backbone(), source, PREPROCESS, batch=3, workers=0, cache=tmp_path)
        assert len(decoded) == 20
        assert torch.equal(first.features, second.features)
        assert torch.equal(first.labels, second.labels)

    def test_whatever_decides_a_feature_is_in_the_key(self, source: Source) -> None:
        model = backbone()

        def name(**changes: object) -> str:
            settings = {
                "model": model,
                "source": source,
                "preprocess": PREPROCESS,
                "reading": "class",
                "precision": "fp32",
            }
            return key(**{**settings, **changes})  # type: ignore[arg-type]

        other, moved = backbone(), backbone()
        with torch.no_grad():
            other.prefix += 1e-7
            moved.prefix += 0
        assert name(model=moved) == name()
        numerics = backbone(numerics=replace(CONFIG.numerics, gelu="erf"))
        keys = [
            name(),
            name(model=other),
            name(model=numerics),
            name(source=subset(source, range(10))),
            name(preprocess=replace(PREPROCESS, interpolation="bicubic")),
            name(reading="mean"),
            name(precision="bf16"),
        ]
        assert len(set(keys)) == len(keys)
        assert weights_hash(numerics) != weights_hash(model)
        # Painted over with as many bytes: names and sizes are as they were.
        os.utime(source[0].picture, ns=(1, 1))
        assert name() not in keys

    def test_what_was_computed_before_an_interruption_stays(
        self, source: Source, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = extract(backbone(), source, PREPROCESS, workers=0).features
        decoded.clear()
        real, model = features.broken, backbone()
        calls = iter(range(100))

        def interrupted(logits: torch.Tensor) -> list[int]:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return real(logits)

        monkeypatch.setattr(features, "broken", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract(model, source, PREPROCESS, batch=6, workers=0, cache=tmp_path)
        assert len(decoded) >= 12
        decoded.clear()
        monkeypatch.setattr(features, "broken", real)
        table = extract(model, source, PREPROCESS, batch=6, workers=0, cache=tmp_path)
        assert len(decoded) == 8
        assert torch.allclose(table.features, wanted, atol=1e-6)

    @pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
    def test_a_damaged_part_is_computed_again(
        self, source: Source, tmp_path: Path, damage: str, decoded: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        wanted = extract(backbone(), source, PREPROCESS, workers=0, cache=tmp_path).features
        (part,) = tmp_path.rglob("*.safetensors")
        data = bytearray(part.read_bytes())
        if damage == "flip":
            data[-3] ^= 16
        part.write_bytes({"cut": data[:-5], "flip": data, "empty": b"", "other": b"\xff" * 100}[damage])
        decoded.clear()
        for _ in range(2):
            assert torch.equal(extract(backbone(), source, PREPROCESS, workers=0, cache=tmp_path).features, wanted)
            assert len(decoded) == 20
        assert "is damaged; its features are computed again" in capsys.readouterr().err

    def test_parts_are_written_on_the_way(
        self, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(features, "PART_SECONDS", 0.0)
        wanted = extract(backbone(), source, PREPROCESS, batch=6, workers=0, cache=tmp_path)
        assert len(list(tmp_path.rglob("*.safetensors"))) == 4
        assert torch.equal(extract(backbone(), source, PREPROCESS, workers=0, cache=tmp_path).features, wanted.features)

    def test_two_processes_at_once(self, source: Source, tmp_path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        both = [context.Process(target=fill, args=(source, tmp_path)) for _ in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(60)
        assert [process.exitcode for process in both] == [0, 0]
        wanted = extract(backbone(), source, PREPROCESS, workers=0).features
        table = extract(backbone(), source, PREPROCESS, workers=0, cache=tmp_path)
        assert table.index.tolist() == list(range(20))
        assert (table.features - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        assert not list(tmp_path.rglob("*.part"))

    def test_a_cache_that_cannot_be_written_is_said(
        self, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_text("")
        table = extract(backbone(), source, PREPROCESS, workers=0, cache=tmp_path / "file")
        assert table.index.shape[0] == 20
        assert "Features are not kept" in capsys.readouterr().err

    def test_where_it_is(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path))
        assert default_cache() == tmp_path / "features"
        monkeypatch.delenv("VITRAIL_CACHE")
        assert default_cache() == Path.home() / ".cache" / "vitrail" / "features"


def fill(source: Source, cache: Path) -> None:
    features.PART_SECONDS = 0.0
    extract(backbone(), source, PREPROCESS, batch=2, workers=0, cache=cache)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all pictures that are decoded, as they are."""
    from vitrail.data.transforms import Transform

    names: list[str] = []
    real = Transform.__call__

    def noted(self: Transform, sample: object, rng: object, name: str = "") -> np.ndarray:
        names.append(name)
        return real(self, sample, rng, name)  # type: ignore[arg-type]

    monkeypatch.setattr(Transform, "__call__", noted)
    return names
