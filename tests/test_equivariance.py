"""Equivariance and locality, measured on models of which they are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.analysis.equivariance import (
    PLACES,
    alone,
    as_map,
    ordered_by_nothing,
    permutation,
    shifted,
    translation,
    whole_product,
)
from vitrail.analysis.internals import trace
from vitrail.analysis.locality import attention_within, even_within, receptive_fields
from vitrail.core.errors import UserError
from vitrail.core.types import Features, Preprocess
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.resnet import ResNet, ResNetConfig, TrunkConfig
from vitrail.models.vit import ViT, ViTConfig

TINY = ViTConfig(16, 2, 2, 32, (4, 4), (24, 32), registers=1)
BARE = replace(TINY, positions="none")
HYBRID = replace(BARE, patch=(1, 1), trunk=TrunkConfig((1, 1), 32))


def vit(config: ViTConfig = BARE, seed: int = 0) -> ViT:
    """Random everywhere, so that nothing that begins at zero hides."""
    model = config.build(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def pictures(height: int = 24, width: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(5))


class Convolutions(ResNet):
    """Two plain convolutions in a ResNet's place, that see 3 pixels each way and nothing else: one cell a pixel."""

    def __init__(self) -> None:
        super().__init__(ResNetConfig((1,), root_width=32))
        self.preprocess = Preprocess(size=(24, 32))
        generator = torch.Generator().manual_seed(0)
        self.kernels = nn.ParameterList(
            [torch.randn(8, 3, 5, 5, generator=generator), torch.randn(8, 8, 3, 3, generator=generator)]
        )

    def features(self, images: Tensor, keep: tuple[int, ...] = ()) -> Features:
        first = F.conv2d(images, self.kernels[0], padding=2)
        return self.told(F.conv2d(first, self.kernels[1], padding=1), (self.told(first),) if keep else ())

    def told(self, x: Tensor, layers: tuple[Features, ...] = ()) -> Features:
        return Features(x.flatten(2).mT[:, :0], x.flatten(2).mT, (x.shape[2], x.shape[3]), (1, 1), layers)


def test_a_convolution_is_equivariant_inside_and_not_at_its_padding() -> None:
    shifts = [(0, 0), (1, 0), (3, -5), (24, 0)]
    inside = translation(Convolutions(), pictures(), shifts, margin=3)
    assert inside.error.shape == (2, 4)
    # Bits may differ where a pixel stands elsewhere in the kernel's blocks.
    assert inside.error.max() < 1e-6
    assert inside.unmoved[:, 1:3].min() > 1
    assert inside.cells.tolist() == [18 * 26, 17 * 26, 15 * 21, 18 * 26]
    assert translation(Convolutions(), pictures(), shifts, margin=0).error[:, 1:3].min() > 0.01
    cropped = translation(Convolutions(), pictures(28, 40), [(0, 0), (4, 0), (3, 8)], "crop", margin=3)
    assert cropped.error.max() < 1e-6


def test_crops_and_shifts_against_plain_numpy() -> None:
    """The error of one cropped shift, cell by cell."""
    model, images = vit(TINY), pictures(28, 40)
    found = translation(model, images, [(4, 8)], "crop", margin=0)
    with torch.no_grad():
        whole = [model.features(images[:, :, y : y + 24, x : x + 32]).tokens for y, x in ((4, 8), (0, 0))]
    before, after = (tokens.reshape(2, 6, 8, 16).double().numpy() for tokens in whole)
    difference = after[:, 1:, 2:] - before[:, :-1, :-2]
    expected = np.linalg.norm(difference.reshape(2, -1), axis=1) / np.linalg.norm(
        before[:, :-1, :-2].reshape(2, -1), axis=1
    )
    np.testing.assert_allclose(found.error[:, 0], expected, rtol=1e-6)


def test_a_map_moves_between_cells_linearly() -> None:
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    torch.testing.assert_close(shifted(x, (1.0, 0.0)), x.roll(1, 2))
    torch.testing.assert_close(shifted(x, (0.0, 0.25))[..., 1:], x[..., 1:] - 0.25)
    torch.testing.assert_close(shifted(x, (-0.5, 0.0))[:, :, :2], x[:, :, :2] + 2)


def test_a_vit_without_positions_moves_by_patches_alone() -> None:
    shifts = [(4, 0), (8, 16), (1, 0), (2, 2)]
    bare = translation(vit(), pictures(), shifts, margin=0).error
    assert bare[:, :2].max() < 1e-5
    assert bare[:, 2:].min() > 0.1
    assert translation(vit(TINY), pictures(), shifts, margin=0).error[:, :2].min() > 0.01
    # What comes in at the border of a crop reaches all patches through attention.
    assert translation(vit(), pictures(28, 40), [(4, 8)], "crop", margin=1).error.min() > 1e-3


def test_a_resnet_and_a_hybrid_move_by_their_stride() -> None:
    """Round the border, and but for the padding at it; GroupNorm's means do not change by moving round."""
    with torch.no_grad():
        resnet = ResNetConfig((1, 1), root_width=32, image=(160, 160)).build().eval()
    found = translation(resnet, pictures(160, 160, 1), [(8, 0), (16, 24), (1, 0)], margin=8)
    assert found.error[:, :2].max() < 0.05
    assert found.error[:, 2].min() > 2 * found.error[:, :2].max()
    hybrid = translation(HYBRID.build().eval(), pictures(160, 160, 1), [(8, 0), (1, 0)], margin=8)
    assert hybrid.error[0, 0] < hybrid.error[0, 1] / 2
    classifier = ClassifierConfig(BARE, 3).build()
    assert isinstance(classifier, Classifier)
    np.testing.assert_allclose(
        translation(classifier, pictures(), [(4, 0)]).error,
        translation(classifier.backbone, pictures(), [(4, 0)]).error,
    )


@pytest.mark.parametrize("config", [BARE, TINY, HYBRID, replace(BARE, qk_norm=True, layer_scale=True, pre_norm=True)])
def test_permuted_patches(config: ViTConfig) -> None:
    """Equal to rounding in the model's own arithmetic; to the bit where sums have no order; not with positions."""
    found = permutation(vit(config), pictures())
    assert found.without_positions.max() < 2e-6
    assert found.double.max() < 1e-14
    assert (found.exact == 0).all()
    assert found.arithmetic.max() < 1e-6
    if config.positions == "none":
        np.testing.assert_array_equal(found.with_positions, found.without_positions)
    else:
        assert found.with_positions.min() > 0.01


def test_each_step_that_has_no_order_is_needed() -> None:
    """The plain sums of the same model in fp64 do differ in bits for some order: equality is no accident."""
    model = vit().double()
    x = torch.randn(1, 48, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, exact = [], []
    with torch.no_grad():
        for seed in range(5):
            order = torch.randperm(48, generator=torch.Generator().manual_seed(seed))
            plain.append(torch.equal(model.encoder(x[:, order])[0], model.encoder(x)[0][:, order]))
            there = ordered_by_nothing(model.encoder, x[:, order])
            exact.append(torch.equal(there, ordered_by_nothing(model.encoder, x)[:, order]))
    assert all(exact)
    assert not all(plain)


def test_whole_products_are_products() -> None:
    x, y = (torch.randn(2, 5, 5, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(whole_product(x, y), x @ y, rtol=0, atol=30 * 2.0**-PLACES)
    with pytest.raises(UserError, match="too large"):
        whole_product(x * 1e3, y * 1e3)
    layer = nn.Linear(5, 3).double()
    torch.testing.assert_close(alone(layer, x), layer(x))


def test_a_field_is_what_a_layer_sees() -> None:
    """Kernels of 5 and 3 pixels: the first layer sees 5 x 5 around its middle, the second 7 x 7, and nothing more."""
    found = receptive_fields(Convolutions(), pictures(), draws=3)
    assert found.values.shape == (2, 24, 32)
    np.testing.assert_allclose(found.values.sum((1, 2)), 1, rtol=1e-6)
    for values, reach in zip(found.values, (2, 3), strict=True):
        y, x = np.nonzero(values)
        assert (y.min(), y.max(), x.min(), x.max()) == (12 - reach, 12 + reach, 16 - reach, 16 + reach)
    assert found.radii[0] < found.radii[1] < found.even


def test_a_field_of_a_vit() -> None:
    """With its attention cut off, a block sees one patch; with it, all of the picture; and the model is left as it was."""
    model = vit()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim > 1)
    found = receptive_fields(model, pictures())
    assert found.values.shape == (3, 24, 32)
    assert (found.values > 0).all()
    assert all(parameter.requires_grad == (parameter.ndim > 1) for parameter in model.parameters())
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.attention.output.weight.zero_()  # type: ignore[union-attr]
    deaf = receptive_fields(model, pictures()).values
    y, x = np.nonzero(deaf[-1])
    assert (y.min(), y.max(), x.min(), x.max()) == (12, 15, 16, 19)


def test_the_field_is_the_jacobians_norm() -> None:
    """Squared gradients of all outputs, written out, agree in the mean over many directions."""
    model, images = Convolutions(), pictures(count=1)
    jacobian = torch.autograd.functional.jacobian(lambda x: as_map(model.features(x))[0, :, 12, 16], images)
    expected = jacobian.square().sum((0, 1, 2)).numpy()
    found = receptive_fields(model, images, draws=400).values[-1]
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.1 * (expected / expected.sum()).max())


def test_attention_within_a_distance_against_numpy() -> None:
    of = trace(vit(TINY), pictures())
    distances = [0.0, 4.0, 10.0, 40.0]
    found = attention_within(of, distances)
    assert found.shape == (2, 2, 2, 4)
    y, x = (place.ravel() * 4 for place in np.mgrid[:6, :8])
    apart = np.hypot(y[:, None] - y, x[:, None] - x)
    for layer in range(2):
        weights = of.weights(layer).numpy()[:, :, 2:, 2:]
        weights = weights / weights.sum(-1, keepdims=True)
        for number, distance in enumerate(distances):
            expected = (weights * (apart <= distance)).sum(-1).mean(-1)
            np.testing.assert_allclose(found[:, layer, :, number], expected, atol=1e-6)
    np.testing.assert_allclose(found[..., -1], 1, atol=1e-6)
    np.testing.assert_allclose(even_within(of, distances), [(apart <= distance).mean() for distance in distances])


def test_mistakes_are_said() -> None:
    with pytest.raises(UserError, match="need pictures of 28 x 32, not 24 x 32"):
        translation(vit(), pictures(), [(4, 0)], "crop")
    with pytest.raises(UserError, match="must go down and right"):
        translation(vit(), pictures(28, 40), [(-4, 0)], "crop")
    with pytest.raises(UserError, match="no cell of a 6 x 8 grid"):
        translation(vit(), pictures(), [(4, 0)], margin=3)
    with pytest.raises(UserError, match="ResNet has no attention"):
        permutation(ResNetConfig((1,), root_width=32).build(), pictures())
