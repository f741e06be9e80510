"""Masked patch prediction: who is corrupted and how, the colour classes, what the loss is of, and how it is measured."""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.types import Batch, Labels, Preprocess
from vitrail.data.augment import Augmentation
from vitrail.evaluation.masked import Guessed, class_of, measure, neighbours, predict
from vitrail.evaluation.metrics import wilson
from vitrail.models.masked import MaskedPatchConfig, MaskedPatchPredictor, Targets
from vitrail.models.resnet import TrunkConfig
from vitrail.models.vit import ViTConfig
from vitrail.objectives.masked import (
    Corruption,
    MaskedPatches,
    classes_of,
    colours_of,
    corrupt,
    drawn,
    fixed,
    levels,
    painted,
    patch_loss,
    patches_at,
)
from vitrail.weights.zoo import create

CPU = torch.device("cpu")
SMALL = ViTConfig(24, 2, 3, 32, (6, 5), (24, 20), class_token=False)
TARGETS: tuple[Targets, ...] = ("mean-colour", "downsized", "pixels")


def predictor(targets: Targets = "mean-colour", backbone: ViTConfig = SMALL) -> MaskedPatchPredictor:
    """With a head that says something already, unlike the zeros that training begins with."""
    model = MaskedPatchConfig(backbone, targets).build(seed=3)
    with torch.no_grad():
        model.head.output.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


def pictures(count: int, channels: int = 3, size: tuple[int, int] = (24, 20), seed: int = 0) -> Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(0, 256, (count, channels, *size), np.uint8))


def batch_of(pixels: Tensor, targets: Labels | None = None) -> Batch:
    count = pixels.shape[0]
    return Batch((pixels,), targets, torch.ones(count, dtype=torch.bool), torch.arange(count))


def task(model: MaskedPatchPredictor, **settings: Any) -> MaskedPatches:
    return MaskedPatches(model, model.config, model.preprocess, **{"augmentation": Augmentation(), **settings})


# Corruption.


def fates(corruption: Corruption) -> Tensor:
    """(b, m): 0 the mask's embedding, 1 another patch's, 2 its own."""
    source = corruption.sources.gather(1, corruption.places)
    return torch.where(source < 0, 0, torch.where(source == corruption.places, 2, 1))


def test_the_shares_over_many_draws() -> None:
    draws, patches = 4000, 16
    found = [corrupt(drawn(10, patches, seed, CPU), 0.5) for seed in range(draws // 10)]
    places = torch.cat([one.places for one in found])
    sources = torch.cat([one.sources for one in found])
    assert places.shape == (draws, patches // 2)
    for row in places[:50]:
        assert row.unique().shape[0] == patches // 2
    kind = torch.cat([fates(one) for one in found]).flatten()
    total = kind.shape[0]
    for which, share in enumerate((0.8, 0.1, 0.1)):
        # Five deviations: a wrong share of 0.81 would be seen, chance is not.
        assert abs(float((kind == which).float().mean()) - share) < 5 * (share * (1 - share) / total) ** 0.5
    each = torch.bincount(places.flatten(), minlength=patches) / draws
    assert (each - 0.5).abs().max() < 5 * (0.25 / draws) ** 0.5
    # Who stands in for whom: any other place equally often, which is not corrupted itself.
    row, place = torch.nonzero((sources >= 0) & (sources != torch.arange(patches)), as_tuple=True)
    stand_in = sources[row, place]
    assert not (places[row] == stand_in[:, None]).any()
    apart = torch.bincount((stand_in - place) % patches, minlength=patches)[1:] / stand_in.shape[0]
    assert (apart - 1 / 15).abs().max() < 5 * (1 / 15 / stand_in.shape[0]) ** 0.5


def test_each_place_that_is_not_corrupted_keeps_its_own() -> None:
    one = corrupt(drawn(6, 20, 5, CPU), 0.3)
    untouched = torch.ones(6, 20, dtype=torch.bool).scatter(1, one.places, False)
    assert torch.equal(one.sources[untouched], torch.arange(20).expand(6, 20)[untouched])
    assert torch.equal(one.hidden, fates(one) < 2)


@pytest.mark.parametrize(
    ("patches", "share", "count"), [(16, 0.5, 8), (2, 0.5, 1), (2, 0.99, 1), (50, 0.01, 1), (9, 0.15, 1)]
)
def test_neither_all_nor_none(patches: int, share: float, count: int) -> None:
    assert corrupt(drawn(3, patches, 0, CPU), share).places.shape == (3, count)


def test_it_is_a_function_of_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    assert torch.equal(drawn(4, 9, 7, CPU), drawn(4, 9, 7, CPU))
    assert not torch.equal(drawn(4, 9, 7, CPU), drawn(4, 9, 8, CPU))
    assert torch.equal(fixed(torch.tensor([5, 2]), 9)[:, 1], fixed(torch.tensor([2]), 9)[:, 0])
    assert torch.equal(torch.random.get_rng_state(), before)


# Targets.


def classes_by_hand(patch: np.ndarray, cells: int) -> list[int]:
    """Of one patch (c, ph, pw), in exact fractions."""
    tall, wide = patch.shape[1:]
    found = []
    for y in range(cells):
        for x in range(cells):
            rows = slice(y * tall // cells, -(-(y + 1) * tall // cells))
            columns = slice(x * wide // cells, -(-(x + 1) * wide // cells))
            digits = 0
            for channel in patch:
                part = channel[rows, columns]
                mean = Fraction(int(part.astype(np.int64).sum()), 255 * part.size)
                digits = 8 * digits + min(int(8 * mean), 7)
            found.append(digits)
    return found


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("patch", [(4, 4), (7, 7), (6, 9), (16, 16)])
@pytest.mark.parametrize("cells", [1, 4])
def test_the_colour_classes(channels: int, patch: tuple[int, int], cells: int) -> None:
    random = np.random.default_rng(1)
    some = random.integers(0, 256, (2, 5, channels, *patch), np.uint8)
    some[0, 0], some[0, 1] = 255, 0
    # A mean of exactly one half lies on an edge between two levels.
    some[0, 2], some[0, 2, :, : patch[0] // 2] = 0, 255
    found = classes_of(levels(torch.from_numpy(some), cells))
    assert found.shape == (2, 5, cells * cells)
    for row in range(2):
        for place in range(5):
            assert found[row, place].tolist() == classes_by_hand(some[row, place], cells)
    assert found[0, 0].tolist() == [8**channels - 1] * cells**2
    assert found[0, 1].tolist() == [0] * cells**2


def test_the_mean_colour_of_numpy() -> None:
    pixels = pictures(3)
    places = torch.arange(16).expand(3, -1)
    means = pixels.numpy().reshape(3, 3, 4, 6, 4, 5).mean((3, 5)).transpose(0, 2, 3, 1).reshape(3, 16, 3) / 255
    wanted = np.minimum(np.floor(8 * means), 7) @ np.array([64, 8, 1])
    assert np.array_equal(classes_of(levels(patches_at(pixels, (6, 5), places)))[..., 0].numpy(), wanted)


def test_colours_lie_in_the_middle_of_their_class() -> None:
    every = torch.arange(512)[None]
    colours = colours_of(every, 3)
    assert torch.equal(class_of(colours), every)
    assert torch.equal(colours[0, 8 * 64 - 1], torch.full((3,), 7.5 / 8))
    assert torch.equal(colours[0, 64], torch.tensor([1.5, 0.5, 0.5]) / 8)


@pytest.mark.parametrize("targets", TARGETS)
def test_the_loss_of_each_patch(targets: Targets) -> None:
    config = MaskedPatchConfig(SMALL, targets)
    preprocess = Preprocess((24, 20), mean=(0.4, 0.5, 0.6), deviation=(0.2, 0.3, 0.4))
    patches = patches_at(pictures(2), (6, 5), torch.tensor([[3, 0, 9], [15, 1, 2]]))
    random = np.random.default_rng(0)
    predicted = random.normal(size=(2, 3, config.numbers)).astype(np.float32)
    found = patch_loss(config, preprocess, torch.from_numpy(predicted), patches)
    for row in range(2):
        for place in range(3):
            said, patch = predicted[row, place].astype(np.float64), patches[row, place].numpy()
            if targets == "pixels":
                centred = patch / 255 - np.array(preprocess.mean)[:, None, None]
                wanted = ((said - (centred / np.array(preprocess.deviation)[:, None, None]).ravel()) ** 2).mean()
            else:
                cells = 1 if targets == "mean-colour" else 4
                logits = said.reshape(cells**2, 512)
                logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
                wanted = -np.mean([logs[cell, c] for cell, c in enumerate(classes_by_hand(patch, cells))])
            assert abs(float(found[row, place]) - wanted) < 1e-5 * max(1, wanted)


def test_predictions_can_be_looked_at() -> None:
    pixels, places = pictures(2), torch.tensor([[3, 0], [15, 1]])
    patches = patches_at(pixels, (6, 5), places)
    preprocess = Preprocess((24, 20), mean=(0.4, 0.5, 0.6), deviation=(0.2, 0.3, 0.4))
    exact = preprocess.normalize(patches.flatten(0, 1)).view(2, 2, -1)
    torch.testing.assert_close(painted(MaskedPatchConfig(SMALL, "pixels"), preprocess, exact), patches / 255)
    for targets, cells in (("mean-colour", 1), ("downsized", 4)):
        config = MaskedPatchConfig(SMALL, targets)  # type: ignore[arg-type]
        classes = classes_of(levels(patches, cells))
        sure = torch.nn.functional.one_hot(classes, 512).float().flatten(2)
        made = painted(config, preprocess, sure)
        assert made.shape == patches.shape
        if targets == "mean-colour":
            assert torch.equal(class_of(made.mean((-1, -2))), classes[..., 0])
            assert (made - made[..., :1, :1]).abs().max() == 0
        else:
            assert torch.equal(made[0, 0, :, 5, 4], colours_of(classes[0, 0, 15], 3))
            assert torch.equal(made[0, 0, :, 0, 4], colours_of(classes[0, 0, 3], 3))


# What the loss is of.


@pytest.mark.parametrize("targets", TARGETS)
def test_every_corrupted_patch_counts_and_no_other(targets: Targets) -> None:
    model, pixels, seed = predictor(targets), pictures(6), 11
    total = task(model)(batch_of(pixels), seed).total
    corruption = corrupt(drawn(6, 16, seed, CPU), 0.5)
    predicted = model(pixels, corruption.sources, corruption.places)
    each = patch_loss(model.config, model.preprocess, predicted, patches_at(pixels, (6, 5), corruption.places))
    kept = ~corruption.hidden
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(total, each.mean())
    assert (each[kept].mean() - each[~kept].mean()).abs() > 1e-4  # so that leaving them out would show
    assert (total - each[~kept].mean()).abs() > 1e-6


def test_no_gradient_comes_from_a_patch_that_is_not_corrupted() -> None:
    model, seed = predictor(), 4
    seen: list[Tensor] = []
    model.backbone.encoder.register_forward_hook(lambda _module, _given, made: seen.append(made[0]))
    total = task(model)(batch_of(pictures(5)), seed).total
    (gradient,) = torch.autograd.grad(total, seen[0])
    touched = gradient.abs().sum(-1) > 0
    assert torch.equal(
        touched, torch.zeros(5, 16, dtype=torch.bool).scatter(1, corrupt(drawn(5, 16, seed, CPU), 0.5).places, True)
    )


def test_hidden_pixels_are_hidden_and_kept_ones_are_not() -> None:
    model, pixels = predictor(), pictures(1)
    seed = next(seed for seed in range(100) if fates(corrupt(drawn(1, 16, seed, CPU), 0.5)).unique().shape[0] == 3)
    corruption = corrupt(drawn(1, 16, seed, CPU), 0.5)
    before = model(pixels, corruption.sources, corruption.places)
    replaced = set(corruption.places[corruption.hidden].tolist())
    for place in range(16):
        y, x = 6 * (place // 4), 5 * (place % 4)
        changed = pixels.clone()
        changed[:, :, y : y + 6, x : x + 5] = 255 - changed[:, :, y : y + 6, x : x + 5]
        after = model(changed, corruption.sources, corruption.places)
        assert torch.equal(after, before) == (place in replaced), place


def test_another_patch_lends_its_embedding_but_not_its_place() -> None:
    model, pixels = predictor(), pictures(1)
    own, places = torch.arange(16)[None], torch.tensor([[2, 7]])
    moved = own.clone()
    moved[0, 2] = 9
    copied = pixels.clone()
    copied[:, :, 0:6, 10:15] = pixels[:, :, 12:18, 5:10]  # patch 9 in the place of patch 2
    torch.testing.assert_close(model(pixels, moved, places), model(copied, own, places))
    hidden = own.clone()
    hidden[0, 2] = -1
    with torch.no_grad():
        model.mask.copy_(model.backbone.tokenize(model.preprocess.normalize(pixels)).x[0, 9])
    torch.testing.assert_close(model(pixels, hidden, places), model(copied, own, places))


def test_rows_that_only_fill_up_do_not_count_and_labels_are_not_looked_at() -> None:
    model, pixels = predictor(), pictures(4)
    whole = task(model)(batch_of(pixels), 3).total
    assert torch.equal(task(model)(batch_of(pixels, Labels(torch.arange(4))), 3).total, whole)
    valid = torch.tensor([True, True, False, False])
    half = task(model)(Batch((pixels,), None, valid, torch.arange(4)), 3).total
    spoilt = pixels.clone()
    spoilt[2:] = 0
    assert torch.equal(task(model)(Batch((spoilt,), None, valid, torch.arange(4)), 3).total, half)
    assert half != whole
    assert task(model)(Batch((pixels,), None, valid & False, torch.arange(4)), 3).total == 0


def test_targets_are_those_of_the_augmented_picture() -> None:
    # All that the flip leaves as it is: a picture with equal halves has the same loss, turned or not.
    model = predictor("pixels")
    left = pictures(1, size=(24, 10))
    both = torch.cat([left, left.flip(-1)], -1)
    plain, seeds = task(model), range(8)
    turned = task(model, augmentation=Augmentation(flip=True))
    assert all(plain(batch_of(both), s).total == turned(batch_of(both), s).total for s in seeds)
    assert any(plain(batch_of(pictures(1)), s).total != turned(batch_of(pictures(1)), s).total for s in seeds)


# The model.


@pytest.mark.parametrize("targets", TARGETS)
def test_its_parameters_are_counted(targets: Targets) -> None:
    for backbone in (SMALL, ViTConfig(24, 1, 2, 32, (8, 8), (16, 24), channels=1)):
        config = MaskedPatchConfig(backbone, targets)
        model = config.build()
        assert sum(parameter.numel() for parameter in model.parameters()) == config.parameters()
        assert {model.layer_of(name) for name, _ in model.named_parameters()} == set(range(backbone.depth + 2))
        assert model.layer_of("mask") == 0


def test_its_backbone_begins_as_a_classifiers_of_the_same_seed() -> None:
    classifier = create("ViT-Nano/7", classes=3, pool="mean", image=(28, 28), seed=5)
    config = classifier.config.backbone
    assert isinstance(config, ViTConfig)
    ours = MaskedPatchConfig(config).build(seed=5).backbone.state_dict()
    torch.testing.assert_close(ours, classifier.backbone.state_dict(), rtol=0, atol=0)


def test_sizes_and_class_tokens_of_every_kind() -> None:
    model = predictor(backbone=ViTConfig(24, 1, 3, 32, (6, 5), (24, 20), channels=1))
    found = task(model)(batch_of(pictures(2, 1, (36, 25))), 0).total
    found.backward()
    assert model.mask.grad is not None
    assert model.mask.grad.abs().sum() > 0


def test_a_hybrid_has_patches_too() -> None:
    trunk = TrunkConfig((1, 1))
    config = ViTConfig(24, 1, 3, 32, (1, 1), (2 * trunk.stride, 2 * trunk.stride), class_token=False, trunk=trunk)
    model = MaskedPatchConfig(config).build()
    total = task(model)(batch_of(pictures(2, size=config.image)), 0).total
    total.backward()
    assert torch.isfinite(total)


@pytest.mark.parametrize(
    ("backbone", "targets", "said"),
    [
        (ViTConfig(24, 1, 3, 32, (3, 3), (6, 6)), "downsized", "a patch of 3 x 3 pixels cannot be downsized to 4 x 4"),
        (ViTConfig(24, 1, 3, 32, (4, 4), (4, 4)), "mean-colour", "nothing is left to predict it from"),
        (ViTConfig(24, 1, 3, 32, (4, 4), (8, 8), channels=7), "mean-colour", "7 channels make 8^7 colours"),
    ],
)
def test_targets_that_do_not_fit(backbone: ViTConfig, targets: Targets, said: str) -> None:
    with pytest.raises(UserError) as found:
        MaskedPatchConfig(backbone, targets)
    assert said in str(found.value)


# Measuring.


def measured(model: MaskedPatchPredictor, pixels: Tensor, batch: int) -> Guessed:
    count = pixels.shape[0]
    index = torch.arange(count)
    parts = [
        Batch((pixels[a:b],), None, torch.ones(b - a, dtype=torch.bool), index[a:b])
        for a, b in pairwise([*range(0, count, batch), count])
    ]
    filled = Batch((pixels[:2],), None, torch.zeros(2, dtype=torch.bool), torch.tensor([-1, -1]))
    return measure(model, [*parts, filled], 0.5, device=CPU, precision="fp32")


@pytest.mark.parametrize("targets", TARGETS)
def test_what_is_measured_by_hand(targets: Targets) -> None:
    model, pixels = predictor(targets), pictures(7)
    model.train()
    found = measured(model, pixels, 7)
    assert model.training
    model.eval()
    hidden = right = near = 0
    losses, seen = [], np.zeros(512, int)
    for row in range(7):
        corruption, predicted = predict(model, pixels[row : row + 1], torch.tensor([row]), 0.5, "fp32")
        patches = patches_at(pixels[row : row + 1], (6, 5), corruption.places)
        losses.append(patch_loss(model.config, model.preprocess, predicted, patches).mean().item())
        colours = painted(model.config, model.preprocess, predicted).mean((-1, -2))
        corrupted = set(corruption.places[0].tolist())
        for i, place in enumerate(corruption.places[0].tolist()):
            if not corruption.hidden[0, i]:
                continue
            true = classes_by_hand(patches[0, i].numpy(), 1)[0]
            y, x = divmod(place, 4)
            around = [(a, b) for a in range(4) for b in range(4) if max(abs(a - y), abs(b - x)) == 1]
            visible = [p for p in around if 4 * p[0] + p[1] not in corrupted]
            visible = visible or [(a, b) for a in range(4) for b in range(4) if 4 * a + b not in corrupted]
            cells = [
                pixels[row, :, 6 * a : 6 * a + 6, 5 * b : 5 * b + 5].double().mean((1, 2)) / 255 for a, b in visible
            ]
            mean = torch.stack(cells).mean(0)
            hidden += 1
            seen[true] += 1
            right += int(class_of(colours[:, i : i + 1])[0, 0]) == true
            near += int((8 * mean).long().clamp(max=7) @ torch.tensor([64, 8, 1])) == true
    assert (found.hidden.sum(), found.right.sum(), found.near.sum()) == (hidden, right, near)
    assert np.array_equal(found.often, seen)
    np.testing.assert_allclose(found.loss, losses, rtol=1e-5)
    rows = found.rows("nats", 7)
    assert rows[0].value == pytest.approx(100 * right / hidden)
    assert rows[2].value == pytest.approx(100 * seen.max() / hidden)
    assert rows[3].value == pytest.approx(np.mean(losses), rel=1e-5)


def test_it_is_the_same_in_any_batch() -> None:
    model, pixels = predictor(), pictures(9)
    one, other = measured(model, pixels, 9), measured(model, pixels, 2)
    for name in ("index", "hidden", "right", "near", "often"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5)


def test_neighbours_of_plain_pictures_are_right() -> None:
    pixels = torch.full((3, 3, 24, 20), 77, dtype=torch.uint8)
    corruption = corrupt(fixed(torch.arange(3), 16), 0.9)
    near = neighbours(pixels, (6, 5), corruption)
    torch.testing.assert_close(near, torch.full_like(near, 77 / 255))


def test_the_interval_covers_as_often_as_it_says() -> None:
    # Patches of one picture that are right or wrong together: counted one by one, the interval would be far too narrow.
    random, covered = np.random.default_rng(0), 0
    for _ in range(400):
        hidden = random.integers(3, 9, 100)
        right = hidden * (random.random(100) < 0.3)
        found = Guessed(np.arange(100), np.zeros(100), hidden, right, right, np.ones(8, int)).rows("")[0]
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 30 <= found.high
    assert 0.91 < covered / 400 < 0.98


def test_to_be_wrong_of_few_pictures_is_not_to_be_always_wrong() -> None:
    none = Guessed(np.arange(6), np.zeros(6), np.full(6, 7), np.zeros(6, int), np.full(6, 7), np.ones(8, int)).rows("")
    assert none[0].value == none[0].low == 0
    assert none[0].high == pytest.approx(100 * wilson(0, 6)[1])
    assert none[1].value == none[1].high == 100
    assert none[1].low == pytest.approx(100 * wilson(6, 6)[0])


def test_predictions_that_are_not_finite_are_refused() -> None:
    model = predictor()
    with torch.no_grad():
        model.head.output.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        measured(model, pictures(2), 2)
