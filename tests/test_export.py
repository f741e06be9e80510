"""Files for other runtimes give the model's answers, and say what they are; in the pass without shape checks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.commands.export import Settings, run
from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.inference.agreement import sample_pictures
from vitrail.inference.export import export, sizes_from
from vitrail.inference.graphs import Asked, openvino_core
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.resnet import ResNetConfig, TrunkConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights.native import save

pytestmark = pytest.mark.unhooked
SMALL = ViTConfig(width=24, depth=2, heads=3, mlp=40, patch=(4, 4), image=(16, 16))
SUFFIX = {"openvino": ".xml", "onnx": ".onnx", "torch-export": ".pt2"}


def waken(model: nn.Module, seed: int = 7) -> Any:
    """Random numbers in every parameter, so that no zero of the initialisation hides a fault."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=source))
    return model.eval()


def classifier(backbone: ViTConfig | ResNetConfig = SMALL, pool: Any = "class", **changes: Any) -> Classifier:
    model = waken(ClassifierConfig(backbone, 3, pool, **changes).build())
    model.labels = ("cat", "dog", "été")
    model.preprocess = Preprocess(backbone.image, mean=(0.4, 0.5, 0.6), deviation=(0.2, 0.3, 0.25))
    return model


def ask(target: str, path: Path, images: Tensor) -> Tensor:
    """What the file answers, by the runtime alone."""
    if target == "openvino":
        compiled = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return torch.from_numpy(compiled([images.numpy()])[0].copy())
    if target == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    return torch.export.load(path).module()(images).detach()


def said(target: str, path: Path) -> dict[str, Any]:
    """The metadata, by the runtime alone."""
    if target == "openvino":
        return json.loads(openvino_core().read_model(path).get_rt_info(["vitrail"]).astype(str))
    if target == "onnx":
        import onnxruntime

        return json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["vitrail"])
    files = {"vitrail.json": ""}
    torch.export.load(path, extra_files=files)
    return json.loads(files["vitrail.json"])


@pytest.mark.parametrize("target", SUFFIX)
@pytest.mark.parametrize("pixels", [True, False])
def test_the_file_is_the_model_at_any_batch(target: Any, pixels: bool, tmp_path: Path) -> None:
    model, path = classifier(), tmp_path / f"m{SUFFIX[target]}"
    made = export(Asked(model), target, path, pixels=pixels)
    assert made.agreements[16, 16].passed
    assert made.agreements[16, 16].count == 4
    for count in (1, 3):
        images = sample_pictures(model.preprocess, count)
        with torch.no_grad():
            wanted = model(images)
        given = images if pixels else model.preprocess.normalize(images)
        torch.testing.assert_close(ask(target, path, given), wanted, rtol=1e-4, atol=1e-4)
    found = said(target, path)
    assert found == made.metadata
    assert found["labels"] == ["cat", "dog", "été"]
    assert found["preprocess"]["mean"] == [0.4, 0.5, 0.6]
    assert found["sizes"] == [[16, 16]]
    suffixes = sorted(file.suffix for file in tmp_path.iterdir())
    assert suffixes == ([".bin", ".xml"] if target == "openvino" else [path.suffix])


@pytest.mark.parametrize("target", SUFFIX)
def test_any_size_in_one_file(target: Any, tmp_path: Path) -> None:
    model, path = classifier(pool="mean"), tmp_path / f"m{SUFFIX[target]}"
    made = export(Asked(model), target, path, sizes=None, pixels=True)
    assert made.metadata["sizes"] == "any"
    assert len(made.agreements) == 3
    images = torch.randint(0, 256, (2, 3, 12, 28), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(ask(target, path, images), model(images), rtol=1e-4, atol=1e-4)


HYBRID = replace(SMALL, patch=(1, 1), image=(32, 32), trunk=TrunkConfig((1,)))
FAMILIES = {
    **{
        kind: (replace(SMALL, positions=kind), "class")
        for kind in ("none", "learned2d", "sincos2d", "relative", "rotary")
    },
    "every": (replace(SMALL, position_layers="every"), "class"),
    "dinov2": (replace(SMALL, registers=2, layer_scale=True, feed_forward="swiglu", qk_norm=True), "class-mean"),
    "deit": (replace(SMALL, distillation_token=True), "prefix"),
    "attention": (replace(SMALL, class_token=False), "attention"),
    "hybrid": (HYBRID, "class"),
    "bit": (ResNetConfig((1, 1), image=(32, 32)), "mean"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    made = export(Asked(classifier(*FAMILIES[family])), "openvino", tmp_path / "m.xml", pixels=True)
    assert all(one.share < 1e-4 for one in made.agreements.values())


def test_a_head_that_answers_zero_is_told_of(tmp_path: Path) -> None:
    made = export(Asked(ClassifierConfig(SMALL, 3).build().eval()), "torch-export", tmp_path / "m.pt2")
    assert made.agreements[16, 16].said.startswith("nothing to compare")


def test_features_of_a_bare_backbone_and_a_list_of_sizes(tmp_path: Path) -> None:
    model = waken(SMALL.build())
    made = export(Asked(model), "torch-export", tmp_path / "m.pt2", sizes=((16, 16), (8, 20)))
    assert made.metadata["output"] == "features"
    assert list(made.agreements) == [(16, 16), (8, 20)]
    images = torch.randn(2, 3, 8, 20)
    with torch.no_grad():
        wanted = model.features(images).prefix[:, 0]
    torch.testing.assert_close(ask("torch-export", tmp_path / "m.pt2", images), wanted, rtol=1e-4, atol=1e-4)


def test_merged_tokens_and_bf16(tmp_path: Path) -> None:
    model = classifier()
    model.backbone.merge = 3
    images = sample_pictures(model.preprocess, 3)
    with torch.no_grad():
        merged = model(images)
    made = export(Asked(model), "openvino", tmp_path / "m.xml", pixels=True)
    assert made.metadata["merge"] == 3
    torch.testing.assert_close(ask("openvino", tmp_path / "m.xml", images), merged, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="how many tokens are merged"):
        export(Asked(model), "openvino", tmp_path / "n.xml", sizes=None)
    model.backbone.merge = 0
    half = export(Asked(model), "torch-export", tmp_path / "m.pt2", pixels=True, precision="bf16")
    assert 1e-5 < half.agreements[16, 16].share < 0.1


def test_other_answers_are_an_error_and_leave_nothing(tmp_path: Path) -> None:
    model = classifier()
    (tmp_path / "m.onnx").write_text("the old file")
    with pytest.raises(UserError, match=r"m\.onnx would give other answers than the model at 16 x 16"):
        export(Asked(model), "onnx", tmp_path / "m.onnx", tolerance=-1.0)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_text() == "the old file"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "m.bin"}, "ends in .xml"),
        ({"sizes": ((16, 17),)}, "does not divide into patches"),
        ({"sizes": ((16, 16), (4, 16))}, "less than two patches"),
        ({"precision": "bf16"}, "no bf16 of its own"),
        ({"precision": "bf16", "target": "onnx", "path": "m.onnx"}, "no bf16 products"),
        ({"precision": "int8", "target": "onnx", "path": "m.onnx"}, "--to openvino"),
        ({"positions": "relative", "sizes": None}, "relative positions"),
    ],
)
def test_what_cannot_be_had_is_said(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = {"target": "openvino", "path": "m.xml", **changes}
    model = classifier(replace(SMALL, positions=given.pop("positions", "learned")))
    path = tmp_path / given.pop("path")
    with pytest.raises(UserError, match=words):
        export(Asked(model), given.pop("target"), path, **given)
    assert not list(tmp_path.iterdir())


def test_sizes_in_words() -> None:
    assert sizes_from(["224", "384x256", "224"]) == ((224, 224), (384, 256))
    assert sizes_from(["224", "any"]) is None
    assert sizes_from([]) == ()
    with pytest.raises(UserError, match="--sizes 3x4x5 is no size"):
        sizes_from(["3x4x5"])


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(classifier(), tmp_path / "w.safetensors")
    out = tmp_path / "m.xml"
    settings = Settings(tmp_path / "w.safetensors", "openvino", out, uint8=True, data="sample:fashion", json=True)
    assert run(settings) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["compared"][0]["difference"] < 1e-3
    assert answer["labels"] == ["cat", "dog", "été"]
    with pytest.raises(UserError, match="is there already"):
        run(settings)
    with pytest.raises(UserError, match="--calibrate"):
        run(replace(settings, out=tmp_path / "n.xml", precision="int8"))
