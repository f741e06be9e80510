"""What makes bf16 training on a CPU faster must not change what is learned: gradients beside exact and plain ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.layers import attention, transformer
from vitrail.layers.attention import WrittenAttention, attention_map
from vitrail.layers.transformer import gelu
from vitrail.models.classifier import Classifier
from vitrail.models.vit import ViT
from vitrail.weights import zoo

# Rounding falls differently each time: over seeds, models and parts alone the quotient lay between 0.90 and 1.05.
NO_WORSE = 1.15


def model_of(seed: int, **overrides: object) -> Classifier:
    model = zoo.create("ViT-Micro/4", classes=10, image=(32, 32), seed=seed, **overrides)  # type: ignore[arg-type]
    assert hasattr(model.head, "output")
    torch.nn.init.normal_(model.head.output.weight, std=0.05, generator=torch.Generator().manual_seed(seed))  # type: ignore[union-attr, arg-type]
    return model


def gradients(model: Classifier, precision: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(8, 3, 32, 32, generator=random), torch.randint(0, 10, (8,), generator=random)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        logits = model(images)
    F.cross_entropy(logits.float(), labels).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of all gradients as one vector, relative."""
    assert found.keys() == exact.keys()
    off = sum((found[name] - exact[name]).double().square().sum() for name in exact)
    return float((off / sum(each.double().square().sum() for each in exact.values())) ** 0.5)


@pytest.mark.parametrize("overrides", [{}, {"qk_norm": True}, {"positions": "rotary"}, {"registers": 2}])
def test_bf16_gradients_are_as_near_to_exact_ones_as_plain_autocast(overrides: dict, monkeypatch) -> None:
    ours, plainly = [], []
    for seed in range(3):
        model = model_of(seed, **overrides)
        exact = gradients(model.eval(), torch.float32, seed)
        ours.append(distance(gradients(model.train(), torch.bfloat16, seed), exact))
        with monkeypatch.context() as patch:
            patch.setattr(attention, "bf16_training_on_cpu", lambda x: False)
            patch.setattr(transformer, "bf16_on_cpu", lambda x: False)
            plainly.append(distance(gradients(model.eval(), torch.bfloat16, seed), exact))
    assert 0.001 < sum(plainly) / 3 < 0.03
    assert sum(ours) <= NO_WORSE * sum(plainly)


@pytest.mark.parametrize("pool", ["class", "mean", "attention"])
@pytest.mark.parametrize("positions", ["learned", "relative", "rotary"])
def test_leaving_out_what_the_pool_ignores_changes_nothing_but_rounding(pool: str, positions: str) -> None:
    model = zoo.create("ViT-Micro/4", classes=10, image=(32, 32), pool=pool, positions=positions)  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.output.weight, std=0.05)  # type: ignore[union-attr, arg-type]
    images, short = torch.randn(2, 3, 32, 32), gradients(model, torch.float32)
    with torch.no_grad():
        short_logits = model(images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ViT, "prefix_features", ViT.features)
        assert distance(short, gradients(model, torch.float32)) < 1e-5
        with torch.no_grad():
            torch.testing.assert_close(short_logits, model(images), rtol=1e-5, atol=1e-5)


def test_what_stands_in_the_place_of_qkv_is_asked_and_hooks_see_it() -> None:
    class Adapter(torch.nn.Module):
        """As adapters are: with the first module's weight, and more."""

        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 1.0

    model, images = model_of(0).eval(), torch.randn(2, 3, 32, 32)
    last = model.backbone.encoder.blocks[-1].attention  # type: ignore[union-attr, index]
    with torch.no_grad():
        plain, seen = model(images), []
        handle = last.qkv.register_forward_hook(lambda module, given, made: seen.append(tuple(made.shape)))  # type: ignore[union-attr, operator]
        torch.testing.assert_close(model(images), plain, rtol=1e-5, atol=1e-5)
        handle.remove()
        assert seen == [(2, 65, 3 * model.config.backbone.width)]
        last.qkv = Adapter(last.qkv)  # type: ignore[union-attr, arg-type, assignment]
        short = model(images)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ViT, "prefix_features", ViT.features)
            torch.testing.assert_close(short, model(images), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(short, plain, atol=1e-4)


def test_quantised_weights_are_never_cut() -> None:
    """torchao puts a kind of tensor in the place of a Linear's weight, which knows the whole product alone."""

    class Quantised(Tensor):
        def __tensor_flatten__(self) -> None:
            raise AssertionError("nobody compiles here")

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            assert "chunk" not in func.__name__
            return super().__torch_function__(func, types, args, kwargs or {})

    model, images = model_of(0).eval(), torch.randn(2, 3, 32, 32)
    last = model.backbone.encoder.blocks[-1].attention  # type: ignore[union-attr, index]
    with torch.no_grad():
        plain = model(images)
        weight = last.qkv.weight.detach().as_subclass(Quantised)  # type: ignore[union-attr, operator]
        last.qkv.weight = torch.nn.Parameter(weight, requires_grad=False)  # type: ignore[union-attr, assignment]
        assert type(last.qkv.weight) is not torch.nn.Parameter  # type: ignore[union-attr]
        torch.testing.assert_close(model(images).as_subclass(Tensor), plain, rtol=1e-5, atol=1e-5)


def test_leaving_out_really_leaves_out() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = zoo.create("ViT-Micro/4", classes=10, image=(32, 32))
    counted = []
    for read in (ViT.features, ViT.prefix_features):
        with FlopCounterMode(display=False) as counter, pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(ViT, "prefix_features", read)
            model(torch.randn(1, 3, 32, 32))
        counted.append(counter.get_total_flops())
    assert counted[1] < 0.92 * counted[0]  # of 6 blocks


def test_checkpointing_and_dropped_paths_take_the_short_way_too() -> None:
    model = model_of(0, drop_path=0.5)
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model.backbone.checkpointing = checkpointing
        runs.append(gradients(model.train(), torch.bfloat16))
    assert distance(runs[1], runs[0]) == 0


@pytest.mark.parametrize(("tokens", "heads", "width"), [(5, 1, 4), (17, 3, 32), (197, 2, 64)])
def test_the_written_attention_is_attention(tokens: int, heads: int, width: int) -> None:
    """In fp32, against autograd of the formula: values and gradients."""
    random = torch.Generator().manual_seed(0)
    made = torch.randn(2, tokens, 3, heads, width, generator=random, requires_grad=True)
    wanted = torch.randn(2, tokens, heads * width, generator=random)
    found = WrittenAttention.apply(made)
    (first,) = torch.autograd.grad(found, made, wanted)
    query, key, value = made.permute(2, 0, 3, 1, 4)
    formula = (attention_map(query, key) @ value).transpose(1, 2).flatten(2)
    (second,) = torch.autograd.grad(formula, made, wanted)
    torch.testing.assert_close(found, formula, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("overrides", [{}, {"qk_norm": True}])
def test_maps_of_many_tokens_are_not_kept(overrides: dict, monkeypatch) -> None:
    model = model_of(0, **overrides).train()
    tokens = model.config.backbone.prefixes + 8 * 8  # type: ignore[union-attr]

    def kept() -> list[tuple[int, ...]]:
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
            gradients(model, torch.bfloat16)
        return shapes

    assert any(shape[-2:] == (tokens, tokens) for shape in kept())
    written = gradients(model, torch.bfloat16)
    monkeypatch.setattr(attention, "LONGEST", tokens - 1)
    assert not any(shape[-2:] == (tokens, tokens) for shape in kept())
    assert 0 < distance(gradients(model, torch.bfloat16), written) < 0.03


def test_the_written_attention_reads_no_memory_that_it_has_not_written() -> None:
    made = torch.randn(2, 17, 3, 2, 32, dtype=torch.bfloat16, requires_grad=True)
    torch.use_deterministic_algorithms(True)  # fills whatever is made empty with NaN
    try:
        found = WrittenAttention.apply(made)
        (gradient,) = torch.autograd.grad(found.float().square().sum(), made)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(found).all()
    assert torch.isfinite(gradient).all()


def test_gelu_in_bf16_is_as_near_to_its_formula_as_bf16_allows() -> None:
    x = torch.linspace(-6, 6, 20_001).bfloat16().requires_grad_()
    exact = x.detach().double().requires_grad_()
    value, truth = gelu(x, "tanh"), F.gelu(exact, approximate="tanh")
    value.sum().backward()
    truth.sum().backward()
    rounding = 2.0**-8  # of bf16, relative
    assert ((value - truth).abs() < rounding * truth.abs() + 5e-4).all()
    assert x.grad is not None
    assert exact.grad is not None
    assert ((x.grad - exact.grad).abs() < rounding * exact.grad.abs() + 2.5e-3).all()
    assert torch.equal(gelu(x.detach(), "tanh"), value.detach()), "without gradients it is the same"
    # On all numbers together it is as near as the formula's own rounding to bf16, and in fp32 it is the formula itself.
    plain = F.gelu(x.detach(), approximate="tanh")
    assert (value - truth).norm() < 1.02 * (plain - truth).norm()
    full = torch.randn(100, requires_grad=True)
    assert torch.equal(gelu(full, "tanh"), F.gelu(full, approximate="tanh"))
