"""The layers against independent sources: NumPy, SciPy, PyTorch's own operators and finite differences."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.core.errors import UserError
from vitrail.core.types import Features, Numerics, Positions
from vitrail.layers.attention import Attention, rotate
from vitrail.layers.heads import AttentionPool, ClassMeanPool, LinearHead, MeanPool, NoHead, PrefixPool
from vitrail.layers.patches import PatchEmbedding
from vitrail.layers.transformer import MLP, Block, Encoder, SwiGLU, Variant


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


# Patches


def test_patch_embedding_is_a_convolution_with_patches_in_row_order() -> None:
    embedding = PatchEmbedding((4, 6), 5, 16)
    embedding.initialize(generator())
    nn.init.normal_(embedding.bias, generator=generator(1))
    images = normal(3, 5, 12, 30)
    tokens = embedding(images)
    expected = F.conv2d(images, embedding.weight, embedding.bias, stride=(4, 6))
    assert tokens.grid == (3, 5)
    torch.testing.assert_close(tokens.x, expected.flatten(2).mT, rtol=1e-5, atol=1e-5)
    assert tokens.coords[1, 7].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 30, 28), r"30 x 28 pixels .* patches of 4 x 4: .* are 28 x 28 or 32 x 28"),
        ((1, 3, 2, 8), r"2 x 8 pixels .* are 4 x 8$"),
        ((1, 1, 28, 28), "1 channels, but the model takes 3"),
    ],
)
def test_pictures_that_do_not_fit_are_refused_in_a_sentence(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PatchEmbedding((4, 4), 3, 8)(torch.zeros(shape))


# Attention


def attention_of(width: int = 24, heads: int = 3) -> Attention:
    attention = Attention(width, heads)
    attention.initialize(generator())
    nn.init.normal_(attention.qkv.bias, generator=generator(1))
    return attention


def relative_bias(query: Tensor) -> Tensor:
    """Depends on the queries, as Table 8's relative positions do."""
    t = query.shape[-2]
    keys = normal(t, t, query.shape[-1], seed=5, dtype=query.dtype)
    return torch.einsum("bhqe,qke->bhqk", query, keys)


def rotary_of(patches: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(patches).float(), torch.linspace(1, 0.1, width // 2)).repeat(1, 2)[None]
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_rotary", [False, True])
@pytest.mark.parametrize("with_valid", [False, True])
def test_the_attention_map_gives_the_fused_output(with_bias: bool, with_rotary: bool, with_valid: bool) -> None:
    attention, x = attention_of(), normal(2, 7, 24, seed=2)
    positions = Positions(rotary=rotary_of(6, 8) if with_rotary else None, bias=relative_bias if with_bias else None)
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3]) if with_valid else None
    weights = attention.weights(x, positions, valid)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7))
    if with_valid:
        assert weights[1, :, :, 4:].abs().max() == 0
    value = attention.qkv(x).chunk(3, dim=-1)[2].unflatten(-1, (3, 8)).transpose(1, 2)
    expected = attention.output((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, positions, valid), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_valid", [False, True])
def test_attention_in_bf16_is_the_same_with_and_without_gradients(with_valid: bool) -> None:
    attention, x = attention_of().bfloat16(), normal(2, 7, 24, seed=2).bfloat16()
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3]) if with_valid else None
    with torch.no_grad():
        fused = attention(x, valid=valid)
    written = attention(x, valid=valid)
    assert written.requires_grad
    torch.testing.assert_close(written, fused, rtol=2e-2, atol=2e-2)


def test_attention_is_torchs_multi_head_attention() -> None:
    attention, x = attention_of(), normal(2, 7, 24, seed=2)
    other = nn.MultiheadAttention(24, 3, batch_first=True)
    parameters = (attention.qkv.weight, attention.qkv.bias, attention.output.weight, attention.output.bias)
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    other.load_state_dict(dict(zip(names, parameters, strict=True)))
    expected, weights = other(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention.weights(x), weights, rtol=1e-5, atol=1e-5)


def test_rotation_leaves_prefixes_and_makes_products_relative() -> None:
    query, key = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)
    cosines, sines = rotary_of(6, 8)
    queries = rotate(query.expand(1, 1, 7, 8), cosines, sines)
    keys = rotate(key.expand(1, 1, 7, 8), cosines, sines)
    assert torch.equal(queries[:, :, 0], query[:, :, 0])
    products = (queries @ keys.mT)[0, 0, 1:, 1:]
    for offset in range(-3, 4):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert (products.diagonal(1)[0] - products.diagonal(-1)[0]).abs() > 1e-2


# Blocks


def encoder_of(depth: int = 3, dropout: float = 0.0, drop_path: float = 0.0) -> Encoder:
    encoder = Encoder(24, depth, 3, 40, Numerics(), dropout, drop_path)
    encoder.initialize(generator())
    return encoder


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("erf", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
        ("tanh", lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("quick", lambda x: x / (1 + math.exp(-1.702 * x))),
    ],
)
def test_the_three_gelus(kind: str, formula: object) -> None:
    mlp = MLP(1, 1, kind)  # type: ignore[arg-type]
    for layer in (mlp.hidden, mlp.output):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    for x in (-3.0, -0.7, 0.2, 2.1):
        assert mlp(torch.tensor([x])).item() == pytest.approx(formula(x), abs=1e-6)  # type: ignore[operator]


@pytest.mark.parametrize("variant", [Variant(), Variant(False, True, True, "swiglu")])
def test_a_blocks_gradient_is_its_finite_difference(variant: Variant) -> None:
    block = Block(8, 2, 12, Numerics(), 0.0, 0.0, variant).double()
    block.initialize(generator())
    for scale in (block.attention_scale, block.mlp_scale):
        if scale is not None:
            nn.init.normal_(scale, generator=generator(2))
    x = normal(1, 3, 8, seed=1, dtype=torch.float64).requires_grad_()
    names, parameters = zip(*block.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


def test_swiglu_is_silu_of_the_first_half_times_the_second() -> None:
    mlp = SwiGLU(6, 4)
    mlp.initialize(generator())
    bound = math.sqrt(6 / (6 + 4))
    assert 0.8 * bound < mlp.hidden.weight.abs().max() <= bound
    x = normal(3, 6)
    gate, value = (x.numpy() @ mlp.hidden.weight.detach().numpy().T + mlp.hidden.bias.detach().numpy()).T.reshape(
        2, 4, 3
    )
    expected = (gate / (1 + np.exp(-gate)) * value).T @ mlp.output.weight.detach().numpy().T
    np.testing.assert_allclose(mlp(x).detach().numpy(), expected, atol=1e-5)


def test_a_blocks_variants_stand_where_their_papers_put_them() -> None:
    block = Block(8, 2, 12, Numerics(norm_epsilon=1e-3), 0.0, 0.0, Variant(qk_norm=True, layer_scale=True))
    block.initialize(generator())
    x = normal(2, 5, 8, seed=1)
    # Each branch begins as nearly nothing.
    assert (block(x) - x).abs().max() < 1e-3
    for parameter in block.parameters():
        nn.init.normal_(parameter, generator=generator(3))
    assert block.attention_scale is not None
    assert block.mlp_scale is not None
    middle = x + block.attention_scale * block.attention(block.attention_norm(x))
    torch.testing.assert_close(block(x), middle + block.mlp_scale * block.mlp(block.mlp_norm(middle)))
    # Queries and keys are normed head by head before they are turned; values are not.
    attention, rotary = block.attention, rotary_of(5, 4)
    query, key, _ = attention.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    turned = []
    for part, norm in ((query, attention.query_norm), (key, attention.key_norm)):
        assert norm is not None
        centred = part - part.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight + norm.bias
        turned.append(rotate(normed, *rotary))
    expected = (turned[0] @ turned[1].mT / 2).softmax(-1)
    torch.testing.assert_close(attention.weights(x, Positions(rotary=rotary)), expected, rtol=1e-4, atol=1e-5)


def test_dropout_stands_where_appendix_b1_puts_it_and_nowhere_else() -> None:
    encoder = encoder_of(depth=2, dropout=0.5).train()
    calls: list[str] = []
    dropped: list[tuple[Tensor, Tensor]] = []

    def record(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append(name)
            if isinstance(module, nn.Dropout):
                dropped.append((inputs[0], output))

        return hook

    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear | nn.Dropout):
            module.register_forward_hook(record(name))  # type: ignore[arg-type]
    x, stem = normal(2, 5, 24), normal(1, 5, 24, seed=1)
    torch.manual_seed(0)
    encoder(x, Positions(stem))
    block = ["attention.qkv", "attention.output", "attention.dropout"]
    block += ["mlp.hidden", "mlp.dropout", "mlp.output", "mlp.dropout"]
    assert calls == ["dropout"] + [f"blocks.{i}.{name}" for i in range(2) for name in block]
    assert torch.equal(dropped[0][0], x + stem)
    assert all(isinstance(m.p, float) and m.p == 0.5 for m in encoder.modules() if isinstance(m, nn.Dropout))
    # The first block's attention map is not dropped: what reaches its dropout is what evaluation computes.
    first = encoder.blocks[0].eval()
    torch.testing.assert_close(dropped[1][0], first.attention(first.attention_norm(dropped[0][1])))


def test_stochastic_depth_grows_linearly_skips_whole_pictures_and_keeps_the_expectation() -> None:
    assert [block.drop_path for block in encoder_of(5, drop_path=0.2).blocks] == pytest.approx(
        [0, 0.05, 0.1, 0.15, 0.2]
    )
    assert encoder_of(1, drop_path=0.2).blocks[0].drop_path == 0
    block = encoder_of(2, drop_path=0.3).blocks[1].train()
    x = normal(1, 3, 24).expand(8000, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        attended = x + block._sometimes(block.attention(block.attention_norm(x)))
        branch = (attended - x)[:, 0, 0] / block.attention(block.attention_norm(x[:1]))[0, 0, 0]
    stayed = branch > 0.5
    assert stayed.float().mean().item() == pytest.approx(0.7, abs=0.02)
    torch.testing.assert_close(branch[stayed], torch.full_like(branch[stayed], 1 / 0.7), rtol=1e-3, atol=1e-3)
    assert branch[~stayed].abs().max() == 0
    assert branch.mean().item() == pytest.approx(1, abs=0.03)


def test_checkpointing_gives_the_same_gradients_with_dropout_and_stochastic_depth() -> None:
    encoder, x = encoder_of(dropout=0.3, drop_path=0.3).train(), normal(8, 5, 24)
    results = []
    for checkpointing in (False, True):
        encoder.checkpointing = checkpointing
        encoder.zero_grad()
        torch.manual_seed(3)
        y, kept = encoder(x, keep=(0, -1))
        (y.square().sum() + kept[0].sum()).backward()
        results.append([y.detach(), *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)])
    assert len(results[0]) == 1 + sum(1 for _ in encoder.parameters())
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_positions_before_each_block_are_obeyed() -> None:
    encoder, x = encoder_of().eval(), normal(2, 5, 24)
    each = tuple(normal(1, 5, 24, seed=i) for i in range(3))
    y, _ = encoder(x, Positions(per_layer=each))
    for block, table in zip(encoder.blocks, each, strict=True):
        x = block(x + table)
    assert torch.equal(y, encoder.norm(x))


def test_tokens_that_only_fill_up_change_nothing() -> None:
    encoder, x = encoder_of().eval(), normal(2, 5, 24)
    filled = torch.cat([x, 100 * normal(2, 3, 24, seed=1)], dim=1)
    valid = torch.tensor([True] * 5 + [False] * 3).expand(2, -1)
    torch.testing.assert_close(encoder(filled, valid=valid)[0][:, :5], encoder(x)[0], rtol=1e-5, atol=1e-5)


def test_a_norm_may_stand_before_the_first_block_and_none_after_the_last() -> None:
    encoder = Encoder(24, 2, 3, 40, Numerics(), 0.0, 0.0, pre_norm=True, final_norm=False)
    encoder.initialize(generator())
    nn.init.normal_(encoder.pre_norm.weight, generator=generator(1))
    x, stem = normal(2, 5, 24), normal(1, 5, 24, seed=1)
    y, kept = encoder(x, Positions(stem), keep=(-1,))
    expected = encoder.pre_norm(x + stem)
    for block in encoder.blocks:
        expected = block(expected)
    assert torch.equal(y, expected)
    assert torch.equal(kept[0], expected)


# Heads


def test_wide_pools_join_two_vectors_and_a_head_may_lack_bias_or_be_none() -> None:
    features = Features(normal(2, 3, 8), normal(2, 6, 8, seed=1), (2, 3), (4, 4))
    mean = features.tokens.sum(1) / 6
    torch.testing.assert_close(ClassMeanPool()(features), torch.cat([features.prefix[:, 0], mean], dim=1))
    assert torch.equal(PrefixPool()(features), torch.cat([features.prefix[:, 0], features.prefix[:, 1]], dim=1))
    assert torch.equal(NoHead()(mean), mean)
    head = LinearHead(8, 5, bias=None)
    head.initialize(generator())
    assert head.output.bias is None
    assert torch.equal(head(mean), torch.zeros(2, 5))


def test_pools_read_the_patch_tokens_and_the_head_starts_at_its_bias() -> None:
    features = Features(normal(2, 1, 8), normal(2, 6, 8, seed=1), (2, 3), (4, 4))
    torch.testing.assert_close(MeanPool()(features), features.tokens.sum(1) / 6)
    pool = AttentionPool(8, 2, 16, Numerics())
    pool.initialize(generator())
    shuffled = Features(normal(2, 1, 8, seed=9), features.tokens[:, torch.tensor([3, 1, 5, 0, 2, 4])], None, (4, 4))
    torch.testing.assert_close(pool(features), pool(shuffled))
    head = LinearHead(8, 5, hidden=7, bias=-6.9)
    head.initialize(generator())
    assert torch.equal(head(normal(2, 8)), torch.full((2, 5), -6.9))
    assert head.hidden is not None
    nn.init.normal_(head.output.weight, generator=generator())
    hidden = np.tanh(normal(2, 8).numpy() @ head.hidden.weight.detach().numpy().T)
    expected = hidden @ head.output.weight.detach().numpy().T - 6.9
    np.testing.assert_allclose(head(normal(2, 8)).detach().numpy(), expected, atol=1e-5)
