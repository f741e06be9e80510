"""Position tables and their resampling, against SciPy, PyTorch and NumPy."""

from typing import Any, get_args

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.core.types import Resampling, Tokens
from vitrail.layers.attention import Attention, rotate
from vitrail.layers.patches import grid_coordinates
from vitrail.layers.positions import (
    LearnedPositions,
    LearnedPositions2d,
    PositionsBeforeEachBlock,
    RelativePositions,
    RotaryPositions,
    SinCosPositions,
    sincos2d,
)
from vitrail.layers.resampling import resample_grid, resample_offsets


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def tokens_on(grid: tuple[int, int], width: int, batch: int = 2) -> Tokens:
    count = grid[0] * grid[1]
    return Tokens(normal(batch, count, width), grid_coordinates(grid).expand(batch, -1, -1), grid)


DRAWN = np.random.default_rng(0).integers(1, 17, size=(40, 2, 2)).tolist()
GRIDS = [
    *(((a, b), (c, d)) for (a, b), (c, d) in DRAWN),
    # As many tokens, in another shape.
    ((4, 9), (9, 4)),
    ((2, 12), (6, 4)),
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


@pytest.mark.parametrize("rule", [rule for rule in get_args(Resampling) if rule != "zoom"])
# At width 1 torch 2.13's own antialiased resizing is wrong.
@pytest.mark.parametrize(("old", "new"), [(old, new) for old, new in GRIDS if min(old[1], new[1]) > 1])
def test_the_other_rules_are_torchs_in_value_and_gradient(
    rule: str, old: tuple[int, int], new: tuple[int, int]
) -> None:
    grid = normal(*old, 6).requires_grad_()
    how: dict[str, Any] = {"mode": rule.split("-")[0], "size": new}
    if rule == "bicubic-offset":
        how = {"mode": "bicubic", "scale_factor": ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])}
    elif rule == "bicubic-aligned":
        how["align_corners"] = True
    how["antialias"] = rule.endswith("antialias")
    expected = F.interpolate(grid.permute(2, 0, 1)[None], **how)[0].permute(1, 2, 0)
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


KEPT = torch.tensor([[14, 3, 0], [7, 7, 2]])


def some(tokens: Tokens) -> Tokens:
    """The three tokens a picture that KEPT names."""
    return Tokens(tokens.x[:, :3], torch.stack([tokens.coords[i, KEPT[i]] for i in range(2)]), None)


@pytest.mark.parametrize("kind", [LearnedPositions, LearnedPositions2d, SinCosPositions])
def test_tokens_without_a_grid_get_the_positions_that_their_coordinates_name(kind: type) -> None:
    positions = SinCosPositions(3, 8) if kind is SinCosPositions else kind(2, (3, 5), 8, "zoom", unplaced=1)
    positions.initialize(generator())
    tokens = tokens_on((3, 5), 8)
    whole = positions(tokens).stem
    assert whole is not None
    assert whole.shape == (1, 18, 8)
    assert whole[0, 2].abs().max() == 0
    found = positions(some(tokens)).stem
    for row in range(2):
        torch.testing.assert_close(found[row], torch.cat([whole[0, :3], whole[0, 3 + KEPT[row]]]))


def test_two_tables_are_joined_x_first_and_resampled_each_along_its_line() -> None:
    positions = LearnedPositions2d(1, (3, 5), 8, "bicubic")
    positions.initialize(generator())
    rows, columns, stem = positions.rows, positions.columns, positions(tokens_on((3, 5), 8)).stem
    assert positions.prefix is not None
    assert stem is not None
    assert torch.equal(stem[0, 0], positions.prefix[0])
    assert torch.equal(stem[0, 1 + 7], torch.cat([columns[2], rows[1]]))
    found = positions(tokens_on((4, 7), 8)).stem
    assert found is not None
    down = F.interpolate(rows.T[None, :, :, None], (4, 1), mode="bicubic")[0, :, :, 0].T
    across = F.interpolate(columns.T[None, :, None], (1, 7), mode="bicubic")[0, :, 0].T
    for place in range(28):
        torch.testing.assert_close(found[0, 1 + place], torch.cat([across[place % 7], down[place // 7]]))


def test_tables_before_each_block_are_one_a_block_or_one_for_all() -> None:
    tables = [LearnedPositions(1, (3, 5), 8, "zoom") for _ in range(3)]
    every, shared = PositionsBeforeEachBlock(tables, 3), PositionsBeforeEachBlock(tables[:1], 3)
    every.initialize(generator())
    tokens = tokens_on((3, 5), 8)
    expected = [table(tokens).stem for table in tables]
    assert not torch.equal(expected[0], expected[1])
    for module, stems in ((every, expected), (shared, expected[:1] * 3)):
        found = module(tokens)
        assert found.stem is None
        assert len(found.per_layer) == 3
        assert all(torch.equal(one, other) for one, other in zip(found.per_layer, stems, strict=True))


# Rotary


def test_rotary_angles_are_dinov3s_at_any_grid() -> None:
    grid, width, base = (3, 5), 16, 100.0
    positions = RotaryPositions((7, 7), width, base)
    rotary = positions(tokens_on(grid, 4)).rotary
    assert rotary is not None
    y, x = np.mgrid[:3, :5].reshape(2, -1)
    centred = [2 * (axis + 0.5) / size - 1 for axis, size in ((y, 3), (x, 5))]
    periods = base ** (np.arange(4) / 4)
    angles = np.concatenate([2 * np.pi * axis[:, None] / periods for axis in centred] * 2, axis=1)
    np.testing.assert_allclose(rotary[0][0].numpy(), np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(rotary[1][0].numpy(), np.sin(angles), atol=1e-5)
    assert not list(positions.parameters())


def test_rotary_products_depend_on_the_offset_alone_and_dropped_tokens_keep_their_angles() -> None:
    positions = RotaryPositions((3, 5), 8, 100.0)
    tokens = tokens_on((3, 5), 4)
    query, key = (normal(1, 1, 1, 8, seed=seed).expand(2, 1, 15, 8) for seed in (0, 1))
    rotary = positions(tokens).rotary
    assert rotary is not None
    products = (rotate(query, *rotary) @ rotate(key, *rotary).mT)[0, 0]
    torch.testing.assert_close(products[6, 0], products[14, 8], rtol=1e-4, atol=1e-5)
    assert (products[6, 0] - products[0, 6]).abs() > 1e-3
    dropped = positions(some(tokens)).rotary
    assert dropped is not None
    for row in range(2):
        torch.testing.assert_close(dropped[0][row], rotary[0][0, KEPT[row]])
        torch.testing.assert_close(dropped[1][row], rotary[1][0, KEPT[row]])


# Relative


def relative(grid: tuple[int, int] = (3, 5), rule: str = "zoom") -> RelativePositions:
    positions = RelativePositions(grid, 8, 2, rule)  # type: ignore[arg-type]
    nn.init.normal_(positions.offsets, generator=generator(3))
    return positions


def test_the_relative_bias_is_an_extra_attention_of_the_query_on_the_difference() -> None:
    positions, tokens = relative(), tokens_on((3, 5), 8)
    query = normal(2, 2, 17, 4)
    bias = positions(tokens).bias
    assert bias is not None
    found = bias(query).detach()
    offsets = positions.offsets.detach().unflatten(-1, (2, 4))
    assert offsets.shape[0] == 2 * 15 - 1
    # Two prefix tokens, which lie nowhere.
    assert found[:, :, :2].abs().max() == found[:, :, :, :2].abs().max() == 0
    for q in range(15):
        for k in range(15):
            # The same embedding wherever the 1-D difference is the same, and in both directions another.
            expected = (query[:, :, 2 + q] * offsets[q - k + 14]).sum(-1) / 2
            torch.testing.assert_close(found[:, :, 2 + q, 2 + k], expected, rtol=1e-4, atol=1e-5)
    dropped = positions(some(tokens)).bias
    assert dropped is not None
    for row in range(2):
        left = torch.cat([torch.tensor([0, 1]), 2 + KEPT[row]])
        expected = found[row][:, left][:, :, left]
        torch.testing.assert_close(dropped(query[:, :, left])[row].detach(), expected, rtol=1e-4, atol=1e-5)


def test_relative_positions_learn_through_fused_attention() -> None:
    positions, x = relative(), normal(2, 16, 8).requires_grad_()
    attention = Attention(8, 2)
    attention.initialize(generator())
    gradients = []
    for written in (False, True):
        made = positions(tokens_on((3, 5), 8))
        if written:
            value = attention.qkv(x).chunk(3, dim=-1)[2].unflatten(-1, (2, 4)).transpose(1, 2)
            out = attention.output((attention.weights(x, made) @ value).transpose(1, 2).flatten(2))
        else:
            out = attention(x, made)
        gradients.append(torch.autograd.grad(out.square().sum(), (positions.offsets, x)))
    for fused, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)
        assert fused.abs().max() > 0


@pytest.mark.parametrize("rule", ["zoom", "bicubic"])
@pytest.mark.parametrize("new", [(3, 5), (4, 7), (5, 3), (2, 2), (1, 4), (6, 1)])
def test_differences_are_resampled_as_ways_down_and_across(new: tuple[int, int], rule: str) -> None:
    offsets = normal(29, 6)
    rows = [[offsets[down * 5 + across + 14] for across in range(-4, 5)] for down in range(-2, 3)]
    ways = torch.stack([torch.stack(row) for row in rows])
    resampled = resample_grid(ways, (2 * new[0] - 1, 2 * new[1] - 1), rule)  # type: ignore[arg-type]
    met: dict[int, list[Tensor]] = {}
    for down in range(1 - new[0], new[0]):
        for across in range(1 - new[1], new[1]):
            met.setdefault(down * new[1] + across, []).append(resampled[down + new[0] - 1, across + new[1] - 1])
    found = resample_offsets(offsets, (3, 5), new, rule)  # type: ignore[arg-type]
    assert sorted(met) == list(range(1 - new[0] * new[1], new[0] * new[1]))
    expected = torch.stack([torch.stack(met[difference]).mean(0) for difference in sorted(met)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [LearnedPositions, LearnedPositions2d, RelativePositions, RotaryPositions])
def test_a_resized_module_gives_what_it_gave_at_that_size(kind: type) -> None:
    positions = {
        LearnedPositions: lambda: LearnedPositions(1, (3, 5), 8, "bicubic"),
        LearnedPositions2d: lambda: LearnedPositions2d(1, (3, 5), 8, "bicubic"),
        RelativePositions: lambda: relative(rule="bicubic"),
        RotaryPositions: lambda: RotaryPositions((3, 5), 8, 100.0),
    }[kind]()
    positions.initialize(generator())
    tokens, query = tokens_on((4, 7), 8), normal(2, 2, 29, 4)
    whole = Tokens(tokens.x, tokens.coords, None)

    def given(tokens: Tokens) -> Tensor:
        made = positions(tokens)
        if made.bias is not None:
            return made.bias(query)
        return made.stem if made.stem is not None else torch.cat(made.rotary, dim=2)

    expected = given(tokens)
    positions.resize((4, 7))
    torch.testing.assert_close(given(tokens), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(given(whole), expected.expand_as(given(whole)), rtol=1e-5, atol=1e-6)
    assert all(parameter.requires_grad for parameter in positions.parameters())


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
