"""How good frozen features are, by the field's protocols: few-shot (the ViT paper's), nearest neighbours (DINO's), a head
trained by SGD (MAE's); the linear probe is solved, in linear.py.

Each protocol is its authors' own, with their constants; what differs is said at its line. Features are fp32 rows, as
`inference.features.extract` gives them; labels are class indices.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.core.device import mix
from vitrail.evaluation.linear import Chosen as Chosen
from vitrail.evaluation.linear import CrossValidated as CrossValidated
from vitrail.evaluation.linear import Linear as Linear
from vitrail.evaluation.linear import check_classes
from vitrail.evaluation.linear import cross_validated as cross_validated
from vitrail.evaluation.linear import linear as linear
from vitrail.evaluation.linear import logistic as logistic
from vitrail.evaluation.linear import ridge as ridge
from vitrail.evaluation.linear import stratified as folds  # noqa: F401, the name that other rooms know

SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2)
PENALTY = 2.0**10
CONSTANT = 100.0
NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07


def few_shot(
    train_features: Float[Tensor, "n d"],
    train_labels: Int[Tensor, "n"],
    test_features: Float[Tensor, "m d"],
    test_labels: Int[Tensor, "m"],
    shots: int,
    seed: int,
) -> float:
    """Accuracy in [0, 1] of regularised least squares on `shots` pictures a class, as big_vision has it.

    Source: section 4.1 of the paper; constants, sampling and whitening of big_vision's evaluators/fewshot_lsr.py: each
    feature is whitened by the few pictures' own mean and deviation (+ 1e-5), a constant 100 is appended, targets are -1 and
    1, the penalty is 2^10 for all. As there, a class with fewer than `shots` pictures silently gives all that it has
    (`short_classes` counts them). Solved in double precision, where the original has fp32.
    """
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    chosen = few_shot_pictures(train_labels, classes, shots, seed).to(train_features.device)
    x, labels = train_features[chosen].double(), train_labels[chosen]
    mean, deviation = x.mean(0), x.std(0, correction=0) + 1e-5

    def whiten(features: Tensor) -> Tensor:
        return F.pad((features.double() - mean) / deviation, (0, 1), value=CONSTANT)

    x, targets = whiten(x), 2 * F.one_hot(labels, classes).double() - 1
    if x.shape[0] >= x.shape[1]:
        values, q = torch.linalg.eigh(x.T @ x)
        weight = q @ ((q.T @ (x.T @ targets)) / (values + PENALTY)[:, None])
    else:
        values, q = torch.linalg.eigh(x @ x.T)
        weight = x.T @ (q @ ((q.T @ targets) / (values + PENALTY)[:, None]))
    predicted = (whiten(test_features) @ weight).argmax(1)
    return float((predicted == test_labels).double().mean())


def few_shot_pictures(labels: Int[Tensor, "n"], classes: int, shots: int, seed: int) -> Int[Tensor, "chosen"]:
    """The rows that few_shot solves on: for one seed, the 5-shot pictures are among the 10-shot ones."""
    random, known = np.random.default_rng(seed), labels.numpy(force=True)
    # Every class draws, empty ones too: the sequence of draws is the protocol's.
    order = [random.permutation(np.flatnonzero(known == label)) for label in range(classes)]
    return torch.from_numpy(np.concatenate([members[:shots] for members in order]))


def short_classes(labels: Int[Tensor, "n"], shots: int) -> int:
    """How many of the classes that have pictures at all have fewer than `shots`."""
    counts = labels.unique(return_counts=True)[1]
    return int((counts < shots).sum())


def nearest_neighbours(
    train_features: Float[Tensor, "n d"],
    train_labels: Int[Tensor, "n"],
    test_features: Float[Tensor, "m d"],
    classes: int,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, Int[Tensor, "m"]]:
    """The class of each test picture by weighted vote of its nearest training pictures, for each number of neighbours.

    Source: DINO (Caron et al. 2021, appendix F.1; after Wu et al. 2018): similarity is the cosine, a vote weighs
    exp(similarity / temperature). Numbers of neighbours above the count of training pictures are left out.
    """
    train, test = F.normalize(train_features.float(), dim=1), F.normalize(test_features.float(), dim=1)
    possible = [number for number in neighbours if number <= train.shape[0]]
    if not possible:
        return {}
    found: dict[int, list[Tensor]] = {number: [] for number in possible}
    for some in test.split(1024):
        similarity, place = (some @ train.T).topk(max(possible), dim=1)
        # Taking the largest off changes no vote and keeps small temperatures finite.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        label = train_labels[place]
        for number in possible:
            votes = weight.new_zeros(some.shape[0], classes)
            votes.scatter_add_(1, label[:, :number], weight[:, :number])
            found[number].append(votes.argmax(1))
    return {number: torch.cat(parts) for number, parts in found.items()}


def sgd(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, "n"],
    classes: int,
    *,
    seed: int = 0,
    rate: float = 0.1,
    batch: int = 16384,
    epochs: int = 90,
    warmup: int = 10,
) -> Linear:
    """MAE's linear probe: LARS with momentum 0.9 and no weight decay, a BatchNorm without scale and shift before the head.

    Source: He et al. 2021, table 10. The rate is `rate` x batch / 256, after a linear warm-up a half cosine down to 0, step
    by step; the head starts from N(0, 0.01^2). The batch is at most n.

    It differs in one thing: features were computed once, from the central crop, so there is no random crop and flip. MAE
    reports its accuracies with them. Deterministic for a seed on one device.
    """
    check_classes(labels)
    random = torch.Generator().manual_seed(mix("sgd probe", seed))
    device, count, batch = features.device, labels.shape[0], min(batch, labels.shape[0])
    norm = nn.BatchNorm1d(features.shape[1], eps=1e-6, affine=False).to(device)
    weight = (0.01 * torch.randn(classes, features.shape[1], generator=random)).to(device).requires_grad_()
    bias = torch.zeros(classes, device=device, requires_grad=True)
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    # As in MAE, what does not fill a batch waits for another epoch.
    steps = max(count // batch, 1)
    for epoch in range(epochs):
        order = torch.randperm(count, generator=random).to(device)
        for step in range(steps):
            some = order[step * batch : (step + 1) * batch]
            logits = F.linear(norm(features[some].float()), weight, bias)
            slopes = torch.autograd.grad(F.cross_entropy(logits, labels[some]), [weight, bias])
            now = rate * batch / 256 * pace(epoch + step / steps, warmup, epochs)
            for parameter, slope, momentum in zip((weight, bias), slopes, momenta, strict=True):
                with torch.no_grad():
                    momentum.mul_(0.9).add_(slope * trust(parameter, slope))
                    parameter.sub_(now * momentum)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    folded = (weight.detach() / (norm.running_var + norm.eps).sqrt()).cpu()
    return Linear(folded, bias.detach().cpu() - folded @ norm.running_mean.cpu(), "logistic", 0.0)


def pace(epoch: float, warmup: int, epochs: int) -> float:
    """The part of the full rate at a fractional epoch."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1))


def trust(parameter: Tensor, slope: Tensor) -> Tensor:
    """LARS (You et al. 2017) with its coefficient of 0.001: steps in proportion to the weights' size; biases have none."""
    size, steepness = parameter.norm(), slope.norm()
    one = torch.ones_like(size)
    if parameter.ndim == 1:
        return one
    return torch.where((size > 0) & (steepness > 0), 0.001 * size / steepness, one)
