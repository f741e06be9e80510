"""Compiled and exported, the model is the eager one; in the pass without shape checks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.resnet import ResNetConfig, TrunkConfig
from vitrail.models.vit import ViTConfig

SMALL = ViTConfig(width=24, depth=4, heads=3, mlp=40, patch=(4, 4), image=(16, 16))


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def waken(model: nn.Module, seed: int = 7) -> nn.Module:
    """Random numbers in every parameter, so that no zero of the initialisation hides a fault."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=source))
    return model


@pytest.fixture
def awake() -> Classifier:
    backbone = ViTConfig(24, 2, 3, 40, (4, 4), (16, 16), drop_path=0.1, dropout=0.1)
    return waken(ClassifierConfig(backbone, 5, "attention").build()).eval()  # type: ignore[return-value]


def compiled_is_eager(model: Classifier, images: Tensor, backend: str) -> None:
    torch.compiler.reset()
    outputs, gradients = [], []
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed, run in ((0, model), (0, compiled), (1, model), (1, compiled)):
        # Twice, with other parameters in between: neither they nor the resampled table may be baked in.
        waken(model, seed) if run is model else None
        model.zero_grad()
        outputs.append(run(images))
        outputs[-1].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for eager in (0, 2):
        torch.testing.assert_close(outputs[eager + 1], outputs[eager], rtol=1e-4, atol=1e-5)
        for pair in zip(gradients[eager + 1], gradients[eager], strict=True):
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)


@pytest.mark.unhooked
def test_compiled_is_eager() -> None:
    config = ViTConfig(24, 1, 3, 40, (4, 4), (16, 16))
    compiled_is_eager(ClassifierConfig(config, 5).build(), pictures(3, 3, 20, 12), "inductor")


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("size", "positions", "pool", "checkpointing"),
    [
        ((16, 16), "none", "mean", False),
        ((20, 12), "learned", "attention", True),
        ((20, 12), "sincos2d", "class", False),
    ],
)
def test_every_kind_is_one_graph(size: tuple[int, int], positions: str, pool: str, checkpointing: bool) -> None:
    config = replace(SMALL, depth=1, positions=positions)  # type: ignore[arg-type]
    model = ClassifierConfig(config, 5, pool, hidden=8).build()  # type: ignore[arg-type]
    model.backbone.checkpointing = checkpointing
    compiled_is_eager(model, pictures(3, 3, *size), "aot_eager")


HYBRID = {"trunk": TrunkConfig((1,), width=32), "final_norm": False}
VARIANTS: dict[str, dict[str, object]] = {
    "relative": {"positions": "relative", "registers": 2, "qk_norm": True, "layer_scale": True},
    "rotary hybrid": {"patch": (1, 2), "positions": "rotary", "feed_forward": "swiglu", "pre_norm": True, **HYBRID},
    "every": {"positions": "learned2d", "position_layers": "every", "prefix_positions": False, "qkv_bias": False},
}


def variant(name: str) -> Classifier:
    if name == "resnet":
        return ClassifierConfig(ResNetConfig((1, 1), root_width=32, image=(16, 16)), 5, "mean").build()
    backbone = replace(SMALL, depth=2, **VARIANTS[name])  # type: ignore[arg-type]
    return ClassifierConfig(backbone, 5, "class-mean", pool_norm=not backbone.final_norm).build()


@pytest.mark.unhooked
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_one_graph(name: str) -> None:
    compiled_is_eager(variant(name), pictures(3, 3, 24, 16), "aot_eager")


@pytest.mark.unhooked
@pytest.mark.parametrize("name", [*VARIANTS, "resnet"])
def test_every_variant_is_exported_at_any_batch_size(name: str) -> None:
    model = waken(variant(name)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (pictures(3, 3, 24, 16),), dynamic_shapes=({0: batch},)).module()
    for count in (1, 5):
        images = pictures(count, 3, 24, 16, seed=count)
        torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.unhooked
@pytest.mark.parametrize("size", [(16, 16), (20, 12)])
def test_exported_is_eager_at_any_batch_size(awake: Classifier, size: tuple[int, int]) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(awake, (pictures(3, 3, *size),), dynamic_shapes=({0: batch},)).module()
    for count in (1, 3, 7):
        images = pictures(count, 3, *size, seed=count)
        torch.testing.assert_close(exported(images), awake(images), rtol=1e-5, atol=1e-5)
    # Nothing of the tracing may stay behind in what is remembered.
    assert awake(pictures(1, 3, *size)).isfinite().all()


@pytest.mark.unhooked
def test_exported_takes_raw_pixels(awake: Classifier) -> None:
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(awake, (pixels,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(pixels[:2]), awake(pixels[:2]), rtol=1e-5, atol=1e-5)
