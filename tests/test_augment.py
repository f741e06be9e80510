"""Batch augmentation: what it does to pixels and labels, from its seed alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.types import Batch, Labels, Preprocess
from vitrail.data.augment import Augmentation, flip, partners

CLASSES = 7
PREPROCESS = Preprocess((12, 10), mean=(0.2, 0.4, 0.6), deviation=(0.5, 0.4, 0.3))
EVERYTHING = Augmentation(True, 2, (2, 10.0), 0.4, 1.0, 0.5)


def batch(rows: int = 64, invalid: tuple[int, ...] = (), seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(rows, dtype=torch.bool)
    valid[list(invalid)] = False
    index = torch.where(valid, torch.arange(rows), -1)
    pixels = torch.randint(0, 256, (rows, 3, 12, 10), dtype=torch.uint8, generator=generator)
    labels = torch.where(valid, torch.randint(0, CLASSES, (rows,), generator=generator), -1)
    return Batch((pixels,), Labels(labels), valid, index)


def pixels_of(done: Batch) -> Tensor:
    """Back from model input to levels."""
    mean, deviation = (torch.tensor(each).view(1, 3, 1, 1) for each in (PREPROCESS.mean, PREPROCESS.deviation))
    return (done.views[0] * deviation + mean) * 255


def run(augmentation: Augmentation, given: Batch, seed: int = 0) -> Batch:
    return augmentation(given, CLASSES, PREPROCESS, seed)


def test_nothing_asked_is_nothing_done() -> None:
    given = batch()
    done = run(Augmentation(), given)
    assert torch.equal(done.views[0], PREPROCESS.normalize(given.views[0]))
    assert done.targets is given.targets
    assert done.valid is given.valid
    assert done.index is given.index


def test_flips_half() -> None:
    given = batch(1000)
    out = pixels_of(run(Augmentation(flip=True), given)).round().to(torch.uint8)
    same = (out == given.views[0]).flatten(1).all(1)
    turned = (out == given.views[0].flip(-1)).flatten(1).all(1)
    assert (same ^ turned).all()
    assert 430 < int(same.sum()) < 570


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_flipped_pixels_lie_as_they_lay(order: torch.memory_format) -> None:
    given = batch(50).views[0].contiguous(memory_format=order)
    before = given.clone()
    turned = flip(given, np.random.default_rng(0))
    assert turned.is_contiguous(memory_format=order)
    assert turned.equal(flip(given.contiguous(), np.random.default_rng(0)))
    assert given.equal(before)  # a step that did not fit into memory is made again from the same batch


def test_it_does_not_matter_how_pixels_lie() -> None:
    given = batch(200)
    lying = replace(given, views=(given.views[0].contiguous(memory_format=torch.channels_last),))
    everything = Augmentation(flip=True, shift=2, randaugment=(3, 12.0), erasing=0.5, mixup=0.2, cutmix=1.0)
    for seed in range(4):
        done, again = run(everything, given, seed), run(everything, lying, seed)
        assert done.views[0].equal(again.views[0])
        assert again.views[0].is_contiguous()


def test_shifts_are_uniform_and_come_in_black() -> None:
    given = batch(2000)
    out = pixels_of(run(Augmentation(shift=2), given)).round().to(torch.uint8)
    counts = np.zeros((5, 5), int)
    for before, after in zip(given.views[0], out, strict=True):
        found = []
        for y in range(-2, 3):
            for x in range(-2, 3):
                wanted = torch.zeros_like(before)
                wanted[:, max(0, y) : 12 + min(0, y), max(0, x) : 10 + min(0, x)] = before[
                    :, max(0, -y) : 12 + min(0, -y), max(0, -x) : 10 + min(0, -x)
                ]
                if torch.equal(wanted, after):
                    found.append((y + 2, x + 2))
        assert len(found) == 1
        counts[found[0]] += 1
    assert counts.min() > 40  # 80 each in the mean, deviation 9


def test_mixup_is_the_official_one() -> None:
    given = batch(8)
    plain = PREPROCESS.normalize(given.views[0])
    weights = []
    for seed in range(300):
        done = run(Augmentation(mixup=0.3), given, seed)
        assert done.targets is not None
        hot = torch.nn.functional.one_hot(given.targets.values, CLASSES).float()  # type: ignore[union-attr]
        away = plain - plain.roll(1, 0)
        weight = float(((done.views[0] - plain.roll(1, 0)) * away).sum() / away.square().sum())
        torch.testing.assert_close(done.views[0], weight * plain + (1 - weight) * plain.roll(1, 0))
        torch.testing.assert_close(done.targets.values, weight * hot + (1 - weight) * hot.roll(1, 0))
        weights.append(weight)
    assert min(weights) >= 0.5 - 1e-5
    drawn = np.random.default_rng(0).beta(0.3, 0.3, 100_000)
    assert abs(np.mean(weights) - np.maximum(drawn, 1 - drawn).mean()) < 0.03


def test_cutmix_weighs_the_area_it_pasted() -> None:
    given = batch(6)
    plain = PREPROCESS.normalize(given.views[0])
    areas = []
    for seed in range(300):
        done = run(Augmentation(cutmix=1.0), given, seed)
        assert done.targets is not None
        own = (done.views[0] == plain).all(1)
        pasted = (done.views[0] == plain.roll(1, 0)).all(1)
        assert (own | pasted).all()
        assert torch.equal(pasted, pasted[:1].expand_as(pasted))  # one box for the batch
        rows, columns = (pasted[0].any(1 - axis).nonzero().flatten() for axis in (0, 1))
        area = len(rows) * len(columns)
        assert int(pasted[0].sum()) == area
        hot = torch.nn.functional.one_hot(given.targets.values, CLASSES).float()  # type: ignore[union-attr]
        weight = 1 - area / 120
        torch.testing.assert_close(done.targets.values, weight * hot + (1 - weight) * hot.roll(1, 0))
        areas.append(area / 120)
    assert 0.2 < np.mean(areas) < 0.5  # half, less what the edges cut off
    assert max(areas) > 0.8
    assert min(areas) < 0.02


def test_both_take_turns() -> None:
    given = batch(6)
    plain = PREPROCESS.normalize(given.views[0])
    outs = [run(Augmentation(mixup=1.0, cutmix=1.0), given, seed).views[0] for seed in range(200)]
    pasted = [bool(((out == plain) | (out == plain.roll(1, 0))).all()) for out in outs]
    assert 60 < sum(pasted) < 140


@pytest.mark.parametrize("invalid", [(), (7,), (0, 3), (5, 6, 7), tuple(range(7)), tuple(range(8))])
def test_invalid_rows_mix_with_nobody(invalid: tuple[int, ...]) -> None:
    given = batch(8, invalid)
    good = [row for row in range(8) if row not in invalid]
    wanted = torch.arange(8)
    for row, before in zip(good, [*good[-1:], *good[:-1]], strict=True):
        wanted[row] = before
    assert torch.equal(partners(given.valid), wanted)
    poisoned = replace(given, views=(torch.where(given.valid[:, None, None, None], given.views[0], 255),))
    for augmentation in (Augmentation(mixup=0.5), Augmentation(cutmix=1.0)):
        for seed in range(5):
            first, second = run(augmentation, given, seed), run(augmentation, poisoned, seed)
            assert torch.equal(first.views[0][good], second.views[0][good])
            assert first.targets is not None
            torch.testing.assert_close(first.targets.values[good].sum(1), torch.ones(len(good)))
            assert not first.targets.values[list(invalid)].any()


def test_mixing_takes_weights_as_labels_too() -> None:
    given = batch(5)
    weights = torch.rand(5, CLASSES, generator=torch.Generator().manual_seed(0))
    done = run(Augmentation(mixup=1.0), replace(given, targets=Labels(weights)))
    assert done.targets is not None
    torch.testing.assert_close(done.targets.values.sum(0), weights.sum(0))
    with pytest.raises(UserError, match="labels"):
        run(Augmentation(mixup=1.0), replace(given, targets=None))


def test_erasing() -> None:
    given = batch(1000)
    plain = PREPROCESS.normalize(given.views[0])
    done = run(Augmentation(erasing=0.4), given).views[0]
    erased = (done != plain).any(1)
    hit = erased.flatten(1).any(1)
    assert 340 < int(hit.sum()) < 460
    for mask in erased[hit]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()
        assert 1 <= box.numel() <= 60
    area = erased[hit].flatten(1).float().mean()
    assert 0.14 < float(area) < 0.21  # uniform from 2 to 33 %, cut off at the edges
    noise = done[erased[:, None].expand_as(done)]
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05


@pytest.mark.parametrize("channels", [1, 3])
def test_everything_is_a_function_of_the_seed(channels: int) -> None:
    preprocess = Preprocess((12, 10), mean=(0.5,) * channels, deviation=(0.5,) * channels)
    given = batch(16)
    given = replace(given, views=tuple(view[:, :channels] for view in (given.views[0], given.views[0].flip(0))))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    copies = [view.clone() for view in given.views]
    first, again, other = (EVERYTHING(given, CLASSES, preprocess, seed) for seed in (3, 3, 4))
    for one, two, three in zip(first.views, again.views, other.views, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, two)
        assert not torch.equal(one, three)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[arg-type]
    assert all(torch.equal(view, copy) for view, copy in zip(given.views, copies, strict=True))
    assert torch.equal(given.targets.values, batch(16).targets.values)  # type: ignore[union-attr]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_draws_the_same() -> None:
    given = batch(32, (31,))
    for augmentation in (replace(EVERYTHING, erasing=0.0), Augmentation(True, 3, (3, 15.0), 0.5)):
        for seed in range(4):
            here, there = run(augmentation, given, seed), run(augmentation, given.to(torch.device("cuda")), seed)
            torch.testing.assert_close(here.views[0], there.views[0].cpu())
            torch.testing.assert_close(here.targets.values, there.targets.values.cpu())  # type: ignore[union-attr]
