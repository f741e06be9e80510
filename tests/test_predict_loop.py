import pytest
import torch
from torch import Tensor, nn

from vitrail.core.types import Batch, Labels
from vitrail.inference.predict import predict


class Sums(nn.Module):
    """Logits that say which pixels they were made from, and whether dropout was off."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)
        self.frozen = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.9)

    def forward(self, images: Tensor) -> Tensor:
        return self.drop(self.frozen(self.linear(images.flatten(1).float() / 255)))


def made(sizes: list[int], filled: int = 0) -> list[Batch]:
    random = torch.Generator().manual_seed(0)
    found, first = [], 0
    for size in sizes:
        images = torch.randint(0, 256, (size, 3, 2, 2), generator=random, dtype=torch.uint8)
        index = torch.arange(first, first + size)
        found.append(Batch((images,), Labels(index % 3), torch.ones(size, dtype=torch.bool), index))
        first += size
    if filled:
        last = found[-1]
        valid = last.valid.clone()
        valid[-filled:] = False
        found[-1] = Batch(last.views, last.targets, valid, torch.where(valid, last.index, -1))
    return found


def test_rows_that_fill_up_are_dropped() -> None:
    torch.manual_seed(0)
    model = Sums()
    found = list(predict(model, made([4, 4, 4], filled=3), device="cpu"))
    assert [p.logits.shape[0] for p in found] == [4, 4, 1]
    assert torch.cat([p.index for p in found]).tolist() == list(range(9))
    assert [t for p in found for t in p.targets.tolist()] == [i % 3 for i in range(9)]
    model.eval()
    with torch.no_grad():
        own = torch.cat([model(b.views[0]) for b in made([4, 4, 4])])[:9]
    torch.testing.assert_close(torch.cat([p.logits for p in found]), own, rtol=0, atol=0)


def test_each_module_is_back_in_the_mode_it_was_found_in() -> None:
    model = Sums().train()
    model.frozen.eval()
    seen = predict(model, made([2, 2]), device="cpu")
    next(seen)
    assert not model.training
    assert not model.drop.training
    seen.close()
    assert model.training
    assert model.drop.training
    assert not model.frozen.training
    with pytest.raises(ZeroDivisionError):
        list(predict(model, made([2]), device="cpu", of=lambda images: 1 / 0))
    assert model.training


def test_gradients_flow_between_batches_and_after() -> None:
    model = Sums()
    for prediction in predict(model, made([2, 2]), device="cpu"):
        assert not torch.is_inference_mode_enabled()
        assert not prediction.logits.requires_grad
        # An ordinary tensor: autograd may use it.
        (prediction.logits * model.linear.bias).sum().backward()
    assert model.linear.bias.grad is not None


def test_bf16_gives_fp32_logits_close_by() -> None:
    model = Sums()
    full = next(iter(predict(model, made([8]), device="cpu"))).logits
    half = next(iter(predict(model, made([8]), device="cpu", precision="bf16"))).logits
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(full, half, rtol=0.02, atol=0.02)


def test_something_else_may_be_asked_of_the_images() -> None:
    model = Sums()
    batch = made([3])
    found = next(iter(predict(model, batch, device="cpu", of=lambda images: images.flatten(1).float())))
    assert torch.equal(found.logits, batch[0].views[0].flatten(1).float())


def test_no_targets_are_none() -> None:
    batch = made([3])[0]
    found = next(iter(predict(Sums(), [Batch(batch.views, None, batch.valid, batch.index)], device="cpu")))
    assert found.targets is None
