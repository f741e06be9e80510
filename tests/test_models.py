"""The ViT as a whole: its initialisation, its shapes at any size, its promises to the rooms above."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from vitrail.core.errors import UserError
from vitrail.core.types import Backbone, Numerics, Preprocess, Tokens
from vitrail.core.values import from_json, to_json
from vitrail.layers.patches import TRUNCATED_DEVIATION
from vitrail.models.classifier import ClassifierConfig, replace_head, resize_classifier
from vitrail.models.resnet import TrunkConfig
from vitrail.models.vit import ViTConfig, resize_backbone

SMALL = ViTConfig(width=24, depth=4, heads=3, mlp=40, patch=(4, 4), image=(16, 16))
POSITIONS = ["none", "learned", "learned2d", "sincos2d", "relative", "rotary"]


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def waken(model: nn.Module, seed: int = 7) -> nn.Module:
    """Random numbers in every parameter, so that no zero of the initialisation hides a fault."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=source))
    return model


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Initialisation


def test_initialisation_is_the_official_one() -> None:
    model = ClassifierConfig(ViTConfig(128, 2, 4, 256, (8, 8), (160, 160)), 10, hidden=96, head_bias=-10.0).build(
        seed=3
    )
    parameters = dict(model.named_parameters())

    kernel = parameters["backbone.patch_embedding.weight"]
    deviation = 1 / math.sqrt(3 * 8 * 8)
    assert kernel.std().item() == pytest.approx(deviation, rel=0.02)
    assert kernel.abs().max().item() == pytest.approx(2 * deviation / TRUNCATED_DEVIATION, rel=0.01)
    assert parameters["head.hidden.weight"].std().item() == pytest.approx(1 / math.sqrt(128), rel=0.02)

    for name in ("position_embedding.grid", "position_embedding.prefix"):
        assert parameters[f"backbone.{name}"].std().item() == pytest.approx(0.02, rel=0.02 if "grid" in name else 0.2)
    block = "backbone.encoder.blocks.1"
    matrices = [*parameters[f"{block}.attention.qkv.weight"].chunk(3), parameters[f"{block}.attention.output.weight"]]
    matrices += [parameters[f"{block}.mlp.hidden.weight"], parameters[f"{block}.mlp.output.weight"]]
    for matrix in matrices:
        bound = math.sqrt(6 / sum(matrix.shape))
        assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert 0.99 * bound < matrix.abs().max().item() <= bound
    for name in ("hidden", "output"):
        assert parameters[f"{block}.mlp.{name}.bias"].std().item() == pytest.approx(1e-6, rel=0.2)

    zeros = ["backbone.prefix", "backbone.patch_embedding.bias", f"{block}.attention.qkv.bias"]
    zeros += [f"{block}.attention.output.bias", "head.output.weight", "head.hidden.bias"]
    assert all(parameters[name].abs().max() == 0 for name in zeros)
    assert (parameters["head.output.bias"] == -10).all()
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 5
    assert all((m.weight == 1).all() and (m.bias == 0).all() and m.eps == 1e-6 for m in norms)


def test_tokens_that_begin_equal_and_without_a_position_would_stay_equal() -> None:
    config = replace(SMALL, distillation_token=True, registers=3, prefix_positions=False)
    prefix = config.build().prefix
    assert prefix is not None
    assert prefix[0].abs().max() == 0
    assert torch.pdist(prefix).min() > 0.02
    assert prefix[1:].std().item() == pytest.approx(0.02, rel=0.2)


def test_flax_cuts_a_normal_whose_deviation_is_known() -> None:
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    inside = math.erf(2 / math.sqrt(2))
    assert math.sqrt(1 - 2 * 2 * density / inside) == pytest.approx(TRUNCATED_DEVIATION, abs=1e-12)


@pytest.mark.parametrize("pool", ["class", "attention"])
def test_initialisation_follows_its_seed_and_leaves_the_global_generator_alone(pool: str) -> None:
    config = ClassifierConfig(SMALL, 5, pool, hidden=8)  # type: ignore[arg-type]
    before = torch.get_rng_state()
    first, again, other = (dict(config.build(seed).named_parameters()) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.hidden.weight"], other["head.hidden.weight"])
    assert all(parameter.isfinite().all() for parameter in first.values())


# Shapes


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("size", [(16, 18), (8, 12), (12, 60), (4, 6)])
def test_any_size_any_channels_non_square_patches(positions: str, class_token: bool, size: tuple[int, int]) -> None:
    config = ViTConfig(24, 2, 3, 40, (4, 6), (16, 18), 5, class_token, positions)  # type: ignore[arg-type]
    features = config.build().features(pictures(2, 5, *size), keep=(0,))
    grid = (size[0] // 4, size[1] // 6)
    assert features.prefix.shape == (2, int(class_token), 24)
    assert features.tokens.shape == (2, grid[0] * grid[1], 24)
    assert features.grid == features.layers[0].grid == grid
    assert features.stride == (4, 6)
    assert config.tokens(size) == grid[0] * grid[1] + int(class_token)


def test_keep_names_raw_block_outputs_in_the_order_asked() -> None:
    model = waken(SMALL.build()).eval()
    images = pictures(2, 3, 16, 16)
    with torch.no_grad():
        features = model.features(images, keep=(-1, 0, 3, -4, 2))
        last = torch.cat([features.layers[0].prefix, features.layers[0].tokens], dim=1)
        normed = model.encoder.norm(last)
    torch.testing.assert_close(normed, torch.cat([features.prefix, features.tokens], dim=1))
    assert torch.equal(features.layers[0].tokens, features.layers[2].tokens)
    assert torch.equal(features.layers[1].tokens, features.layers[3].tokens)
    assert not torch.equal(features.layers[4].tokens, features.layers[0].tokens)
    assert model.features(images).layers == ()
    for layer in (4, -5):
        with pytest.raises(UserError, match=f"keep names block {layer}, but the model's 4 blocks are 0 to 3"):
            model.features(images, keep=(layer,))


@pytest.mark.parametrize(
    ("positions", "layers"), [*((kind, "stem") for kind in POSITIONS), ("learned", "every"), ("learned2d", "shared")]
)
def test_the_joints_in_a_row_are_features_and_let_tokens_be_dropped_between(positions: str, layers: str) -> None:
    config = replace(SMALL, positions=positions, position_layers=layers, registers=2)  # type: ignore[arg-type]
    model = waken(config.build()).eval()
    images = pictures(2, 3, 16, 16)
    tokens = model.tokenize(images)
    whole = model.encode(tokens, model.positions(tokens))
    assert torch.equal(whole.tokens, model.features(images).tokens)
    # Some of the tokens are the same as all with the others marked not valid.
    kept = torch.tensor([[9, 2, 4, 15], [0, 1, 7, 3]])
    rows = torch.arange(2)[:, None]
    some = Tokens(tokens.x[rows, kept], tokens.coords[rows, kept], None)
    dropped = model.encode(some, model.positions(some))
    valid = torch.zeros(2, 16, dtype=torch.bool).scatter(1, kept, True)
    masked = model.encode(replace(tokens, valid=valid), model.positions(tokens))
    assert dropped.grid is None
    torch.testing.assert_close(dropped.tokens, masked.tokens[rows, kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dropped.prefix, masked.prefix, rtol=1e-4, atol=1e-5)
    if positions != "none":
        still = model.encode(tokens, type(model.positions(tokens))())
        assert (still.tokens - whole.tokens).abs().max() > 1e-2


def test_checkpointing_is_an_attribute_of_the_model() -> None:
    model = waken(ClassifierConfig(SMALL, 5).build()).train()
    gradients = []
    for checkpointing in (False, True):
        model.backbone.checkpointing = checkpointing
        model.zero_grad()
        model(pictures(2, 3, 16, 16)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("changes", [{}, {"positions": "relative"}, {"positions": "rotary", "qk_norm": True}])
def test_the_residual_stream_stays_fp32_under_autocast_and_a_bf16_model_runs(changes: dict[str, object]) -> None:
    config = replace(SMALL, layer_scale=bool(changes), **changes)  # type: ignore[arg-type]
    model = waken(ClassifierConfig(config, 5).build()).eval()
    images = pictures(2, 3, 16, 24)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.backbone.features(images, keep=(-1,)).layers[0].tokens.dtype == torch.float32
        torch.testing.assert_close(model(images).float(), exact, rtol=0.1, atol=0.1)
    low = model.bfloat16()(images)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=0.2, atol=0.2)


def test_every_parameter_belongs_to_a_layer_and_the_protocol_holds() -> None:
    model = ClassifierConfig(SMALL, 5, "attention").build()
    assert isinstance(model.backbone, Backbone)
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert set(layers.values()) == {0, 1, 2, 3, 4, 5}
    assert layers["backbone.position_embedding.grid"] == layers["backbone.prefix"] == 0
    assert layers["backbone.encoder.blocks.2.mlp.hidden.weight"] == 3
    assert layers["backbone.encoder.norm.weight"] == layers["head.output.weight"] == layers["pool.probe"] == 5
    with pytest.raises(ValueError, match="no parameter 'trunk'"):
        model.backbone.layer_of("trunk")
    other = replace(SMALL, position_layers="every", pre_norm=True, layer_scale=True, registers=1).build()
    layers = {name: other.layer_of(name) for name, _ in other.named_parameters()}
    assert layers["position_embedding.2.grid"] == layers["encoder.blocks.2.mlp_scale"] == 3
    assert layers["encoder.pre_norm.weight"] == layers["prefix"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "multiple of its heads"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"image": (18, 16)}, "18 x 16 pixels"),
        ({"patch": (0, 4)}, "at least 1 pixel"),
        ({"width": 30, "positions": "sincos2d"}, "multiple of 4"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"width": 27, "positions": "learned2d"}, "multiple of 2, not 27"),
        ({"width": 30, "positions": "rotary"}, "heads of a multiple of 4 numbers, not 10"),
        ({"positions": "rotary", "rotary_base": 0.0}, "must be above 0"),
        ({"positions": "sincos2d", "position_layers": "every"}, "not sincos2d"),
        ({"registers": -1}, "cannot have -1 registers"),
        ({"class_token": False, "distillation_token": True}, "the model has none"),
    ],
)
def test_configs_that_do_not_fit_together_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)  # type: ignore[arg-type]


def test_a_config_survives_json() -> None:
    config = ClassifierConfig(
        ViTConfig(24, 2, 3, 40, (4, 6), (16, 18), 1, False, "sincos2d", 0.1, 0.2, Numerics("erf", 1e-12, "bicubic")),
        7,
        "attention",
        hidden=9,
    )
    assert from_json(ClassifierConfig, to_json(config)) == config
    backbone = replace(SMALL, patch=(1, 1), trunk=TrunkConfig((1,)), positions="learned2d", position_layers="every")
    other = ClassifierConfig(backbone, 24, head="none", output="embedding", pool_norm=True)
    assert from_json(ClassifierConfig, to_json(other)) == other


# The classifier


def test_raw_pixels_are_normalised_floats_are_not_and_nothing_else_is_taken() -> None:
    model = waken(ClassifierConfig(SMALL, 5).build()).eval()
    model.preprocess = Preprocess((16, 16), mean=(0.1, 0.2, 0.3), deviation=(0.5, 0.6, 0.7))
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    torch.testing.assert_close(model(pixels), model((pixels / 255 - mean) / deviation))
    with pytest.raises(UserError, match="int64"):
        model(pixels.long())


def test_a_pool_needs_what_it_pools_and_labels_need_their_count() -> None:
    config = replace(SMALL, class_token=False)
    with pytest.raises(UserError, match="no class token"):
        ClassifierConfig(config, 5, "class")
    with pytest.raises(UserError, match="no class token"):
        ClassifierConfig(config, 5, "class-mean")
    with pytest.raises(UserError, match="no distillation token"):
        ClassifierConfig(SMALL, 5, "prefix")
    with pytest.raises(UserError, match="without a head, the 24 pooled numbers come out, and not 5"):
        ClassifierConfig(SMALL, 5, head="none")
    with pytest.raises(UserError, match="at least 1 class"):
        ClassifierConfig(SMALL, 0)
    with pytest.raises(UserError, match="2 labels were given for 5 classes"):
        replace_head(SMALL.build(), 5, ("a", "b"))


@pytest.mark.parametrize("pool", ["class", "mean", "attention"])
def test_a_new_head_is_zero_and_the_rest_is_kept(pool: str) -> None:
    old = waken(ClassifierConfig(SMALL, 5, pool, hidden=8).build()).bfloat16()  # type: ignore[arg-type]
    new = replace_head(old, 3, ("a", "b", "c"), head_bias=-1.0)
    assert new.backbone is old.backbone
    assert new.pool is old.pool
    assert new.labels == ("a", "b", "c")
    assert new.config == ClassifierConfig(SMALL, 3, pool, head_bias=-1.0)  # type: ignore[arg-type]
    assert torch.equal(new(pictures(2, 3, 16, 16)), torch.full((2, 3), -1.0, dtype=torch.bfloat16))
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    bare = replace_head(SMALL.build(), 3)
    assert bare.config.pool == "class"
    assert bare.config.parameters() == count(bare)
    other = replace_head(old, 3, pool="mean" if pool != "mean" else "attention")
    assert count(other) == other.config.parameters()


def test_a_norm_after_the_pool_stays_with_it_and_a_backbone_without_one_gets_one() -> None:
    backbone = replace(SMALL, final_norm=False)
    config = ClassifierConfig(backbone, 24, "mean", pool_norm=True, head="none", output="embedding")
    old = waken(config.build())
    new = replace_head(old, 3)
    assert new.pool_norm is old.pool_norm
    assert new.config == ClassifierConfig(backbone, 3, "mean", pool_norm=True)
    other = replace_head(old, 3, pool="class")
    assert other.pool_norm is not None
    assert other.pool_norm is not old.pool_norm
    assert (other.pool_norm.weight == 1).all()
    for model in (new, other, replace_head(backbone.build(), 3)):
        assert model.config.pool_norm
        assert count(model) == model.config.parameters()
        assert model.layer_of("pool_norm.weight") == 5


@pytest.mark.parametrize(
    ("positions", "layers"), [*((kind, "stem") for kind in POSITIONS), ("learned", "every"), ("learned2d", "shared")]
)
def test_a_resized_model_computes_the_same_and_trains_its_own_grid(positions: str, layers: str) -> None:
    config = replace(SMALL, positions=positions, position_layers=layers)  # type: ignore[arg-type]
    model = waken(ClassifierConfig(config, 5).build()).eval()
    images = pictures(2, 3, 24, 32)
    expected = model(images)
    model.preprocess = Preprocess((16, 16), resize=20)
    resize_classifier(model, (24, 32))
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    assert model.config.backbone == model.backbone.config
    assert model.config.backbone.image == model.preprocess.size == (24, 32)
    assert model.preprocess.resize == 30
    assert count(model) == model.config.parameters()
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    if positions == "learned" and layers == "stem":
        model.zero_grad()
        model(images).sum().backward()
        grid = model.backbone.position_embedding.grid
        assert grid.shape == (6, 8, 24)
        assert grid.grad.abs().min() > 0
    with pytest.raises(UserError, match="30 x 30"):
        resize_backbone(model.backbone, (30, 30))
