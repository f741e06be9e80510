"""What is seen inside against what the model did, and against plain NumPy versions written from the papers."""

import gc
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from vitrail.analysis.attention import attention_distances, attention_of, uniform_distance
from vitrail.analysis.internals import Trace, answer_reads, joined, one_token, trace
from vitrail.analysis.rollout import class_relevance, rollout
from vitrail.core.errors import UserError
from vitrail.layers.heads import PoolKind
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.resnet import ResNetConfig, TrunkConfig
from vitrail.models.vit import ViTConfig

TINY = ViTConfig(16, 3, 2, 32, (4, 4), (12, 20), registers=2)
VARIANTS = {
    "plain": TINY,
    "every layer": replace(TINY, position_layers="every"),
    "2-D, shared": replace(TINY, positions="learned2d", position_layers="shared"),
    "sin-cos, no class token": replace(TINY, positions="sincos2d", class_token=False, registers=0),
    "relative": replace(TINY, positions="relative"),
    "rotary, normed queries": replace(TINY, positions="rotary", qk_norm=True, layer_scale=True, feed_forward="swiglu"),
    "none, norm before": replace(TINY, positions="none", pre_norm=True, final_norm=False, distillation_token=True),
    "hybrid": replace(TINY, patch=(1, 1), image=(12, 20), trunk=TrunkConfig((), 32)),
}


def classifier(config: ViTConfig, pool: PoolKind = "class", seed: int = 0) -> Classifier:
    """Random everywhere: a head of zeros and a token of zeros would make every gradient zero."""
    model = ClassifierConfig(config, 5, pool, pool_norm=not config.final_norm).build(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def pictures(config: ViTConfig, count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, *config.image, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_maps_reproduce_what_the_fused_attention_gave(config: ViTConfig) -> None:
    model, images = classifier(config, "class" if config.class_token else "mean"), pictures(config)
    of = trace(model, images)
    with torch.no_grad():
        own = model.backbone.features(images)
        torch.testing.assert_close(of.features.tokens, own.tokens, rtol=0, atol=0)
        for layer in range(of.depth):
            block, x = of.block(layer), of.given(layer)
            normed, weights = block.attention_norm(x), of.weights(layer)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-6)
            _, _, value = block.attention.project(normed, of.positions)
            fused = block.attention(normed, of.positions)
            assert (block.attention.merge(weights @ value) - fused).abs().max() < 1e-5 * max(1, fused.abs().max())
            after = joined(of.features.layers[layer])
            torch.testing.assert_close(block(x, of.positions), after, rtol=0, atol=0)


def test_a_model_in_training_is_looked_at_without_dropout_and_left_in_training() -> None:
    config = replace(TINY, dropout=0.5, drop_path=0.5)
    model, images = classifier(config), pictures(config)
    quiet = trace(model, images).features.prefix
    model.train()
    model.pool.eval()
    torch.testing.assert_close(trace(model, images).features.prefix, quiet, rtol=0, atol=0)
    class_relevance(model, images, torch.tensor([0, 1]))
    assert model.training
    assert model.backbone.training
    assert not model.pool.training


def test_pixels_are_normalised_as_the_model_has_it() -> None:
    model = classifier(TINY)
    pixels = torch.randint(0, 256, (1, 3, *TINY.image), dtype=torch.uint8)
    seen = trace(model, model.preprocess.normalize(pixels)).features.tokens
    torch.testing.assert_close(trace(model, pixels).features.tokens, seen, rtol=0, atol=0)


# Plain NumPy, from the papers


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def plain_maps(of: Trace) -> list[np.ndarray]:
    """softmax(q k^T / sqrt(e)) of each layer (b, heads, t, t) in float64, Eq. 6 and 7."""
    maps = []
    for layer in range(of.depth):
        attention = of.block(layer).attention
        x = of.given(layer).double().numpy()
        norm = of.block(layer).attention_norm
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
        x = x * norm.weight.detach().double().numpy() + norm.bias.detach().double().numpy()
        qkv = x @ attention.qkv.weight.detach().double().numpy().T + attention.qkv.bias.detach().double().numpy()
        b, t, d = x.shape
        q, k, _ = qkv.reshape(b, t, 3, attention.heads, d // attention.heads).transpose(2, 0, 3, 1, 4)
        maps.append(softmax(q @ k.transpose(0, 1, 3, 2) / np.sqrt(d // attention.heads)))
    return maps


def test_maps_agree_with_numpy() -> None:
    of = trace(classifier(TINY), pictures(TINY))
    for layer, plain in enumerate(plain_maps(of)):
        np.testing.assert_allclose(of.weights(layer).numpy(), plain, rtol=0, atol=1e-6)


def test_attention_distance_agrees_with_numpy() -> None:
    """Appendix D.7, loop by loop: rows of another length than columns, and pixels that are not square patches."""
    config = replace(TINY, patch=(4, 2), image=(12, 10))
    of = trace(classifier(config), pictures(config))
    rows, columns, prefixes = 3, 5, config.prefixes
    expected = np.zeros((2, config.depth, config.heads))
    for layer, maps in enumerate(plain_maps(of)):
        for b in range(2):
            for head in range(config.heads):
                for query in range(rows * columns):
                    weights = maps[b, head, prefixes + query, prefixes:]
                    far = [
                        np.hypot(4 * (key // columns - query // columns), 2 * (key % columns - query % columns))
                        for key in range(rows * columns)
                    ]
                    expected[b, layer, head] += np.average(far, weights=weights) / (rows * columns)
    np.testing.assert_allclose(attention_distances(of), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(attention_distances(of) / 20, expected / 20, rtol=0, atol=1e-6)
    np.testing.assert_allclose(attention_distances(of, (2,)), expected[:, 2:], rtol=0, atol=1e-5)


def test_the_distance_of_even_attention() -> None:
    model = classifier(TINY)
    with torch.no_grad():
        for block in model.backbone.encoder.blocks:
            block.attention.qkv.weight.zero_()
            block.attention.qkv.bias.zero_()
    of = trace(model, pictures(TINY))
    assert uniform_distance(of.grid, of.stride) == pytest.approx(float(attention_distances(of).mean()), rel=1e-5)
    assert uniform_distance((1, 3), (16, 16)) == pytest.approx(16 * (3 + 2 + 3) / 9)


def test_rollout_agrees_with_numpy() -> None:
    """Abnar and Zuidema, section 4, and appendix D.8: the whole matrix, from the first layer on."""
    of = trace(classifier(TINY), pictures(TINY))
    t = TINY.tokens()
    whole = np.eye(t)[None]
    for maps in plain_maps(of):
        added = maps.mean(1) + np.eye(t)
        whole = (added / added.sum(-1, keepdims=True)) @ whole
    np.testing.assert_allclose(rollout(of), whole[:, 0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(rollout(of).sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(rollout(of, one_token(of, 7)), whole[:, 7], rtol=0, atol=1e-6)
    on_grid = of.on_grid(rollout(of))
    assert on_grid.shape == (2, 3, 5)
    assert on_grid[1, 2, 4] == rollout(of)[1, -1]


def plain_logits(model: Classifier, entered: np.ndarray, changed: dict[tuple[int, ...], float]) -> np.ndarray:
    """A ViT of Eq. 2 to 4 in NumPy from the encoder's input on, with numbers added to some entries of its maps."""
    state = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x, heads = entered, model.backbone.config.heads
    for layer in range(model.backbone.depth):
        name = f"backbone.encoder.blocks.{layer}"
        qkv = dense(norm(x, f"{name}.attention_norm"), f"{name}.attention.qkv")
        q, k, v = qkv.reshape(len(x), 3, heads, -1).transpose(1, 2, 0, 3)
        weights = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]))
        for (place, *entry), by in changed.items():
            if place == layer:
                weights[tuple(entry)] += by
        x = x + dense((weights @ v).transpose(1, 0, 2).reshape(x.shape), f"{name}.attention.output")
        hidden = dense(norm(x, f"{name}.mlp_norm"), f"{name}.mlp.hidden")
        hidden = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + dense(hidden, f"{name}.mlp.output")
    return dense(norm(x, "backbone.encoder.norm")[0], "head.output")


def test_gradient_weighted_attention_agrees_with_numpy() -> None:
    """Chefer et al., Eq. 5 and 6, where even the gradient is plain: differences of a NumPy forward pass."""
    config = ViTConfig(8, 2, 2, 12, (4, 4), (8, 8))
    model, images = classifier(config), pictures(config, 1)
    of, t, step = trace(model, images), config.tokens(), 1e-4
    entered = of.entered[0].double().numpy()
    np.testing.assert_allclose(plain_logits(model, entered, {}), model(images)[0].detach().numpy(), atol=1e-5)
    whole = np.eye(t)
    for layer, maps in enumerate(plain_maps(of)):
        gradient = np.zeros((config.heads, t, t))
        for entry in np.ndindex(gradient.shape):
            up, down = (plain_logits(model, entered, {(layer, *entry): by})[3] for by in (step, -step))
            gradient[entry] = (up - down) / (2 * step)
        whole = whole + np.maximum(gradient * maps[0], 0).mean(0) @ whole
    found = class_relevance(model, images, torch.tensor([3]))
    assert np.abs(whole[0, 1:]).max() > 0.01
    np.testing.assert_allclose(found[0], whole[0], rtol=0, atol=1e-6 * max(1, np.abs(whole[0]).max()))


def test_classes_have_relevance_of_their_own() -> None:
    model, images = classifier(TINY), pictures(TINY)
    first, second = (class_relevance(model, images, torch.tensor(pair)) for pair in ([0, 1], [1, 1]))
    assert np.abs(first[0] - second[0]).max() > 1e-4
    np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.parametrize("pool", ["class", "mean", "attention", "class-mean", "prefix"])
def test_a_walk_back_starts_where_the_answer_is_read(pool: PoolKind) -> None:
    config = replace(TINY, distillation_token=True)
    model, images = classifier(config, pool), pictures(config)
    of = trace(model, images)
    reads = answer_reads(of).numpy()
    np.testing.assert_allclose(reads.sum(1), 1, atol=1e-6)
    patches = reads[:, config.prefixes :].sum(1)
    np.testing.assert_allclose(patches, {"class": 0, "prefix": 0, "class-mean": 0.5}.get(pool, 1), atol=1e-6)
    np.testing.assert_allclose(rollout(of).sum(1), 1, atol=1e-6)
    assert class_relevance(model, images, torch.tensor([0, 1])).shape == (2, config.tokens())


def test_an_attention_pools_map_is_the_one_it_pools_by() -> None:
    model, images = classifier(TINY, "attention"), pictures(TINY)
    of, pool = trace(model, images), model.pool
    with torch.no_grad():
        key = pool.key_value(of.features.tokens).chunk(2, -1)[0]
        q, k = (x.unflatten(-1, (2, -1)).transpose(-3, -2).double().numpy() for x in (pool.query(pool.probe), key))
    expected = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(8))[:, :, 0].mean(1)
    np.testing.assert_allclose(answer_reads(of)[:, TINY.prefixes :].numpy(), expected, atol=1e-6)


def test_a_heads_look_from_a_patch() -> None:
    of = trace(classifier(TINY), pictures(TINY))
    looked = attention_of(of, 1, one_token(of, 3 + 8))
    assert looked.shape == (2, 2, 3, 5)
    np.testing.assert_allclose(looked.reshape(2, 2, 15), of.weights(1)[:, :, 11, 3:].numpy(), rtol=0, atol=1e-7)


def test_what_cannot_be_seen_is_said_in_a_sentence() -> None:
    resnet = ResNetConfig((1,), image=(8, 8), root_width=32).build()
    with pytest.raises(UserError, match="a ResNet has no attention"):
        trace(resnet, torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="no head, so there is no class"):
        class_relevance(TINY.build(), pictures(TINY), torch.tensor([0, 0]))


def test_one_map_is_held_at_a_time() -> None:
    of = trace(classifier(TINY), pictures(TINY))
    alive: list[weakref.ref] = []
    most = 0

    class Counting(Trace):
        def weights(self, layer: int) -> torch.Tensor:
            nonlocal most
            made = super().weights(layer)
            alive.append(weakref.ref(made))
            gc.collect()
            most = max(most, sum(one() is not None for one in alive))
            return made

    counting = Counting(of.model, of.entered, of.positions, of.features)
    rollout(counting)
    attention_distances(counting)
    assert len(alive) == 6
    assert most == 1


PEAK = """
import re, torch
from pathlib import Path
from vitrail.analysis.attention import attention_distances
from vitrail.analysis.internals import trace
from vitrail.analysis.rollout import class_relevance, rollout
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.vit import ViTConfig

# Not getrusage's, which begins with the parent's peak.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
torch.set_num_threads(1)
config = ViTConfig(8, 9, 1, 8, (16, 16), (1024, 1024))
model = ClassifierConfig(config, 2).build().eval()
small = torch.zeros(1, 3, 64, 64)
class_relevance(model, small, torch.tensor([0])), rollout(trace(model, small)), attention_distances(trace(model, small))
images, before = torch.zeros(1, 3, 1024, 1024), peak()
of = trace(model, images)
whole = 9 * of.entered.shape[1] ** 2 * 4
rollout(of), attention_distances(of, (0, 8)), class_relevance(model, images, torch.tensor([0]))
print((peak() - before) / whole)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_at_1024_pixels_the_maps_of_all_layers_never_exist_together() -> None:
    """A map of one layer is a ninth of them all; a handful of such (a map, its gradient, their product) may stand."""
    ended = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    share = float(ended.stdout)
    assert 1 / 9 < share < 0.75, share
