"""Position tables and their resampling, against SciPy, PyTorch and NumPy."""

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.core.types import Tokens
from vitrail.layers.patches import grid_coordinates
from vitrail.layers.positions import LearnedPositions, SinCosPositions, resample_grid, sincos2d


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def tokens_on(grid: tuple[int, int], width: int, batch: int = 2) -> Tokens:
    count = grid[0] * grid[1]
    return Tokens(normal(batch, count, width), grid_coordinates(grid).expand(batch, -1, -1), grid)


GRIDS = [
    ((7, 7), (12, 12)),
    ((14, 14), (24, 24)),
    ((4, 9), (6, 6)),
    ((5, 3), (8, 2)),
    ((3, 8), (1, 5)),
    ((1, 4), (3, 4)),
]


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_zoom_is_scipys(old: tuple[int, int], new: tuple[int, int]) -> None:
    grid = normal(*old, 6)
    expected = scipy.ndimage.zoom(grid.numpy(), (new[0] / old[0], new[1] / old[1], 1), order=1)
    np.testing.assert_allclose(resample_grid(grid, new, "zoom").numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("rule", ["bilinear", "bicubic", "bicubic-antialias"])
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_the_other_rules_are_torchs_in_value_and_gradient(
    rule: str, old: tuple[int, int], new: tuple[int, int]
) -> None:
    grid = normal(*old, 6).requires_grad_()
    mode, antialias = rule.split("-")[0], rule.endswith("antialias")
    expected = F.interpolate(grid.permute(2, 0, 1)[None], size=new, mode=mode, antialias=antialias)[0].permute(1, 2, 0)
    found = resample_grid(grid, new, rule)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wanted = normal(*new, 6, seed=1)
    gradients = [torch.autograd.grad((table * wanted).sum(), grid)[0] for table in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_resampling_is_the_identity_at_the_same_grid_and_not_at_the_same_count() -> None:
    grid = normal(4, 9, 6)
    assert resample_grid(grid, (4, 9), "zoom") is grid
    assert resample_grid(grid, (9, 4), "zoom").shape == (9, 4, 6)


def test_resampling_stays_in_fp32_under_autocast() -> None:
    grid = normal(4, 4, 8)
    expected = resample_grid(grid, (7, 7), "bicubic")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resample_grid(grid, (7, 7), "bicubic"), expected)


def test_what_is_remembered_of_a_size_goes_stale_neither_by_training_nor_by_inference_mode() -> None:
    positions = LearnedPositions(1, (4, 4), 8, "zoom")
    positions.initialize(generator())
    tokens = tokens_on((5, 7), 8)
    with torch.inference_mode():
        before = positions(tokens).stem.clone()
    positions(tokens).stem.square().sum().backward()
    assert positions.grid.grad is not None
    assert positions.grid.grad.abs().min() > 0
    with torch.no_grad():
        positions.grid.add_(1)
        positions.prefix.add_(1)
    torch.testing.assert_close(positions(tokens).stem.detach(), before + 1)


@pytest.mark.parametrize("kind", ["learned", "sincos2d"])
def test_tokens_without_a_grid_get_the_positions_that_their_coordinates_name(kind: str) -> None:
    positions: nn.Module
    if kind == "learned":
        positions = LearnedPositions(2, (3, 5), 8, "zoom")
        positions.initialize(generator())
    else:
        positions = SinCosPositions(2, 8)
    tokens = tokens_on((3, 5), 8)
    whole = positions(tokens).stem
    assert whole.shape == (1, 17, 8)
    kept = torch.tensor([[14, 3, 0], [7, 7, 2]])
    some = Tokens(tokens.x[:, :3], torch.stack([tokens.coords[i, kept[i]] for i in range(2)]), None)
    found = positions(some).stem
    for row in range(2):
        torch.testing.assert_close(found[row], torch.cat([whole[0, :2], whole[0, 2 + kept[row]]]))


def test_sincos_is_big_visions_order_and_exact_at_any_grid() -> None:
    width, grid = 24, (3, 11)
    y, x = np.mgrid[: grid[0], : grid[1]].reshape(2, -1)
    omega = 1 / 10_000.0 ** np.linspace(0, 1, width // 4)
    expected = np.concatenate([f(np.outer(axis, omega)) for axis in (x, y) for f in (np.sin, np.cos)], axis=1)
    np.testing.assert_allclose(sincos2d(grid_coordinates(grid), width)[0].numpy(), expected, atol=1e-6)
    stem = SinCosPositions(1, width)(tokens_on(grid, width)).stem
    assert stem is not None
    assert stem[0, 0].abs().max() == 0
    np.testing.assert_allclose(stem[0, 1:].numpy(), expected, atol=1e-6)
