"""Token merging against a plain NumPy one, written from the paper (arXiv 2210.09461, 3): loops, no shared line."""

import re
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.layers.merging import Groups, Merging, match, merge, spread
from vitrail.models.resnet import ResNetConfig
from vitrail.models.vit import ViT, ViTConfig, merge_tokens


def backbone(**changes: object) -> ViT:
    settings = {"width": 16, "depth": 3, "heads": 2, "mlp": 24, "patch": (4, 4), "image": (20, 16), "registers": 2}
    model = ViTConfig(**settings | changes).build(seed=1).eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def numpy_step(
    x: np.ndarray, keys: np.ndarray, sizes: np.ndarray, prefixes: int, count: int, keep: str = "mean"
) -> tuple[list[np.ndarray], list[float], list[list[int]]]:
    """One picture: x (t, d), keys (heads, t, e), sizes (t,). Also which old tokens each new one is made of."""
    patches = np.arange(prefixes, len(x))
    a, b = patches[0::2], patches[1::2]
    metric = keys.mean(0)
    edges = []
    for i in a:
        cosines = [metric[i] @ metric[j] / np.linalg.norm(metric[i]) / np.linalg.norm(metric[j]) for j in b]
        edges.append((max(cosines), i, b[int(np.argmax(cosines))]))
    drawn = {i: j for _, i, j in sorted(edges, reverse=True)[:count]}
    tokens, counts = [x[p] for p in range(prefixes)], [1.0] * prefixes
    members = [[p] for p in range(prefixes)]
    for i in a:
        if i not in drawn:
            tokens.append(x[i])
            counts.append(sizes[i])
            members.append([i])
    for j in b:
        group = [j, *(i for i in a if drawn.get(i) == j)]
        total = sum(sizes[i] for i in group)
        tokens.append(x[j] if keep == "one" else sum(x[i] * sizes[i] for i in group) / total)
        counts.append(total)
        members.append(group)
    return tokens, counts, members


@pytest.mark.parametrize(("tokens", "keep"), [(12, "mean"), (13, "mean"), (13, "one")])
def test_merging_is_the_papers(tokens: int, keep: Literal["mean", "one"]) -> None:
    random = np.random.default_rng(0)
    x, groups, prefixes = random.normal(size=(2, 3 + tokens, 6)), Groups(), 3
    present, sizes = list(x), [np.ones(3 + tokens)] * 2
    origin = [[{i} for i in range(3 + tokens)] for _ in range(2)]
    state = torch.from_numpy(x)
    for count in (4, 3, 2):
        keys = random.normal(size=(2, 2, state.shape[1], 5))
        state, groups = merge(state, groups, match(torch.from_numpy(keys.mean(1)), prefixes, count), keep)
        for row in range(2):
            found, counts, members = numpy_step(present[row], keys[row], sizes[row], prefixes, count, keep)
            present[row], sizes[row] = np.array(found), np.array(counts)
            origin[row] = [set().union(*(origin[row][i] for i in group)) for group in members]
        assert state.shape[1] == len(present[0])
        assert groups.size is not None
        assert groups.owner is not None
        np.testing.assert_allclose(state.numpy(), np.array(present), atol=1e-12)
        np.testing.assert_array_equal(groups.size.numpy(), np.array(sizes))
        assert groups.size.sum(1).tolist() == [3 + tokens] * 2
        for row in range(2):
            owners = groups.owner[row].tolist()
            assert [{i for i, owner in enumerate(owners) if owner == place} for place in range(len(members))] == origin[
                row
            ]
    whole = spread(state, groups)
    assert whole.shape == x.shape
    for place, origins in enumerate(origin[1]):
        assert all(torch.equal(whole[1, i], state[1, place]) for i in origins)


def test_proportional_attention_is_attention_over_copies() -> None:
    """Eq. 1: a token of size 3 is looked at as three equal tokens are."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 4, 8, generator=generator, dtype=torch.float64)
    size = torch.tensor([[1.0, 3.0, 1.0, 2.0]], dtype=torch.float64)
    copies = torch.tensor([0, 1, 1, 1, 2, 3, 3])
    seen = torch.nn.functional.scaled_dot_product_attention(query, key, value, Groups(size=size).mask(query))
    whole = torch.nn.functional.scaled_dot_product_attention(query, key[:, :, copies], value[:, :, copies])
    torch.testing.assert_close(seen, whole)


def answer(model: ViT, images: Tensor, count: int | str) -> tuple[Tensor, Tensor]:
    merge_tokens(model, count)
    with torch.no_grad():
        features = model.features(images)
    return features.prefix, features.tokens


def test_equal_tokens_merge_without_a_loss() -> None:
    model = backbone(positions="none")
    patch = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = patch.repeat(2, 1, 5, 4)
    whole = answer(model, images, 0)
    merged = answer(model, images, 4)
    torch.testing.assert_close(merged, whole, rtol=0, atol=2e-5)


def test_off_is_what_it_always_was_and_on_is_not() -> None:
    model, images = backbone(), torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.features(images, keep=(0, 2))
        merge_tokens(model, 4)
        merged = model.features(images, keep=(0, 2))
        merge_tokens(model, 0)
        after = model.features(images, keep=(0, 2))
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.prefix, after.prefix)
    assert torch.equal(before.layers[1].tokens, after.layers[1].tokens)
    assert merged.grid == before.grid
    assert merged.tokens.shape == before.tokens.shape
    assert merged.layers[0].tokens.shape == before.tokens.shape
    assert len(torch.unique(merged.tokens[0], dim=0)) == 20 - 3 * 4
    assert not torch.allclose(merged.prefix, before.prefix, atol=1e-3)


def test_the_class_token_alone_is_the_same_while_merging() -> None:
    model, images = backbone(), torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(0))
    model.merge = 4
    with torch.no_grad():
        torch.testing.assert_close(model.prefix_features(images).prefix, model.features(images).prefix)


def test_more_than_there_is_to_merge_halves_the_tokens() -> None:
    model, images = backbone(), torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(0))
    assert len(torch.unique(answer(model, images, 1000)[1][0], dim=0)) == 3  # 20, 10, 5, 3


def test_a_merged_model_can_be_trained() -> None:
    model = backbone()
    model.merge = 3
    model.features(torch.randn(2, 3, 20, 16)).tokens.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("words", "keep"), [("", "mean"), (",keep=one", "one")])
def test_what_is_merged_how_and_in_which_block(words: str, keep: str) -> None:
    """Block by block: by the tokens' own likeness after attention, in block 1 alone, looked at once."""
    model, images = backbone(), torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.tokenize(images)
        x, prefixes = model.encoder.enter(model.prepend(tokens.x), model.positions(tokens)), model.config.prefixes
        for layer, block in enumerate(model.encoder.blocks):
            x = block.add_attended(x, block.attention(block.attention_norm(x)))  # type: ignore[operator, union-attr]
            if layer == 1:
                rows = [numpy_step(row, row[None], np.ones(len(row)), prefixes, 4, keep) for row in x.double().numpy()]
                x = torch.from_numpy(np.array([found for found, _, _ in rows])).float()
            x = block.add_transformed(x, block.mlp(block.mlp_norm(x)))  # type: ignore[operator, union-attr]
        model.merge = f"4,blocks=1,by=tokens{words},attention=plain"
        kept = model.features(images, keep=(0, 2)).layers
        model.merge = 0
        torch.testing.assert_close(kept[0].tokens, model.features(images, keep=(0,)).layers[0].tokens)
    for row in range(2):
        merged = torch.unique(kept[1].tokens[row], dim=0)
        expected = torch.unique(x[row, prefixes:], dim=0)
        assert expected.shape[0] == 20 - 4
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_after_the_last_merging_block_merged_tokens_still_weigh_what_they_stand_for() -> None:
    """Sizes outlive the merging: equal tokens of equal pictures say what all of them said."""
    model = backbone(positions="none")
    images = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 5, 4)
    whole = answer(model, images, 0)
    torch.testing.assert_close(answer(model, images, "8,blocks=0"), whole, rtol=0, atol=2e-5)
    assert not torch.allclose(answer(model, images, "8,blocks=0,attention=plain")[0], whole[0], atol=1e-3)


def test_a_block_that_is_not_there_is_refused() -> None:
    model = backbone()
    with pytest.raises(UserError, match="merge names block 3, but the model's blocks are 0 to 2"):
        model.merge = "4,blocks=1+3"


def test_plain_attention_looks_at_a_merged_token_once() -> None:
    model, images = backbone(), torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(0))
    proportional, plain = answer(model, images, "4"), answer(model, images, "4,attention=plain")
    assert not torch.allclose(proportional[0], plain[0], atol=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Groups, "mask", lambda self, query: None)
        torch.testing.assert_close(answer(model, images, "4")[0], plain[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "words", ["0", "7", "24,blocks=0", "24,blocks=1+3,by=tokens,keep=one,attention=plain", "5,attention=plain"]
)
def test_what_is_said_can_be_given(words: str) -> None:
    how = Merging.of(words)
    assert str(how.said) == words
    assert Merging.of(how.said) == how
    assert bool(how) == (words != "0")


@pytest.mark.parametrize(
    "words", ["", "many", "4,from=3", "4,by=values", "4,by=keys,blocks=2", "4,blocks=2+", "4,keep=two", "1.5"]
)
def test_words_that_say_nothing_are_refused(words: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--merge {words} is not known: give 48, or 48,blocks=1+3")):
        Merging.of(words)


@pytest.mark.parametrize("prefixed", [True, False])
def test_openvino_merges_alike(prefixed: bool) -> None:
    from vitrail.inference.engines import engine
    from vitrail.inference.graphs import Asked

    model = backbone(registers=2 if prefixed else 0, class_token=prefixed)
    model.merge = 4 if prefixed else "4,blocks=0+1,by=tokens,keep=one,attention=plain"
    whole = Asked(model, "class" if prefixed else "mean")
    pixels = torch.randint(0, 256, (5, 3, 20, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        expected = whole(pixels)
    torch.testing.assert_close(engine(whole, "openvino", batch=5)(pixels), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"positions": "relative"}, "'relative'"),
        ({"positions": "rotary"}, "'rotary'"),
        ({"position_layers": "every"}, "'every'"),
    ],
)
def test_positions_after_the_stem_are_refused(changes: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=f"enter at the stem, and this model's are {said}"):
        merge_tokens(backbone(**changes), 2)


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(UserError, match="at least 0"):
        merge_tokens(backbone(), -1)
    resnet = ResNetConfig((1,), image=(8, 8), root_width=32).build()
    merge_tokens(resnet, 0)
    with pytest.raises(UserError, match="a ResNet has no tokens"):
        merge_tokens(resnet, 2)
