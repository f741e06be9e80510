"""Where the time of a training step goes: `python bench/profile_training.py --threads 2`.

The real `fit` is profiled over a few steps on one batch in memory, so that whatever the loop does counts. Each
operator's own time goes to one group; operators inside the optimiser or the augmentation go there whatever they are. The
machine's rate of large matrix products stands beside it, and the share of it that a step reaches (three times the forward
pass's multiply-accumulates, divided by the step's time without the profiler).
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from vitrail.core.types import Batch, Labels, Progress
from vitrail.data.augment import Augmentation
from vitrail.objectives.supervised import Supervised
from vitrail.training.loop import fit
from vitrail.training.optim import Optimiser, Schedule
from vitrail.training.pace import Pace
from vitrail.weights import zoo

CASES = {
    "ViT-S/16 224 px batch 8": ("ViT-S/16", 224, 8, 1000),
    "ViT-S/16 224 px batch 32": ("ViT-S/16", 224, 32, 1000),
    "ViT-Ti/4 32 px batch 128": ("ViT-Ti/4", 32, 128, 10),
}
OPTIMISER = Optimiser(rate=1e-3, weight_decay=0.05, clip=1.0)
# The first that matches decides, from the operator outwards.
WITHIN = {"Optimizer.step": "optimiser", "augment": "augmentation"}
GROUPS = (
    (("log_softmax", "logsigmoid"), "loss"),
    (("bmm", "baddbmm"), "attention: products"),
    (("softmax",), "attention: softmax"),
    (("scaled_dot", "flash_attention"), "attention: fused"),
    (("addmm", "mm", "mkldnn_linear"), "dense layers"),
    (("layer_norm",), "norms"),
    (("gelu",), "GELU"),
    (("_foreach_norm", "linalg_vector_norm", "_foreach_mul_"), "clipping"),
    (("add", "add_"), "sums"),
    (("mul", "mul_"), "products with numbers"),
    (("sum",), "gradients of biases"),
    (("zero_", "fill_"), "filling with zeros"),
    (("cat",), "copies"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), help=f"of: {', '.join(CASES)}")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=6, help="profiled and timed, each")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    rates = {name: matrix_rate(kind) for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    print("matrix products: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))
    found: dict[str, Any] = {
        "matrix_rate": rates,
        "settings": {"precision": settings.precision, "steps": settings.steps},
    }
    for name in settings.cases:
        model, size, batch, classes = CASES[name]
        seconds, groups, rest = look(model, size, batch, classes, settings.precision, settings.steps)
        rate = flops(model, size, batch) / seconds
        share = rate / rates[settings.precision]
        found[name] = {"seconds": seconds, "rate": rate, "share": share, "milliseconds": groups, "unnamed": rest}
        print(f"\n{name}: {seconds * 1e3:.0f} ms a step, {rate / 1e9:.0f} GFLOP/s, {share:.0%} of the matrix rate\n")
        total = sum(groups.values())
        print("| part | ms a step | share |\n|---|---|---|")
        for group, spent in sorted(groups.items(), key=lambda item: -item[1]):
            print(f"| {group} | {spent:.1f} | {spent / total:.1%} |")
        print("other: " + ", ".join(f"{key} {spent:.1f}" for key, spent in rest.items()))
    measure.write(f"profile_training_{settings.precision}", found, settings.out)
    return 0


def matrix_rate(kind: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a large square product, the best of several."""
    a, b, best = torch.randn(size, size).to(kind), torch.randn(size, size).to(kind), float("inf")
    for _ in range(8):
        begun = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def flops(model: str, size: int, batch: int) -> int:
    """Of a step: two each multiply-accumulate, and a backward pass is two forward ones."""
    return 6 * batch * zoo.config(model, (size, size)).macs()


def look(
    model: str, size: int, batch: int, classes: int, precision: str, steps: int
) -> tuple[float, dict[str, float], dict[str, float]]:
    """Seconds of a median step; milliseconds a step by group; the largest of those in no group, by operator."""
    repeated = Repeated(made_batch(size, batch, classes), 2 * steps + 2)
    profiler = profile(activities=[ProfilerActivity.CPU])
    repeated.at_step[steps + 1] = profiler.start
    train(model, size, classes, repeated, precision)
    profiler.stop()
    groups, rest = Counter[str](), Counter[str]()
    for event in profiler.events():
        spent = event.self_cpu_time_total / 1e3 / steps
        group = group_of(event)
        groups[group] += spent
        if group == "other":
            rest[event.name] += spent
    return float(np.median(repeated.seconds[1:steps])), dict(groups), dict(rest.most_common(8))


def group_of(event: Any) -> str:
    above = event
    while above is not None:
        for name, group in WITHIN.items():
            if above.name.startswith(name):
                return group
        above = above.cpu_parent
    name = event.name.removeprefix("aten::")
    for names, group in GROUPS:
        if name in names or any(len(part) >= 4 and part in name for part in names):
            return group
    if name == "copy_":
        return "casts" if event.cpu_parent is not None and event.cpu_parent.name == "aten::_to_copy" else "copies"
    return "other"


def made_batch(size: int, batch: int, classes: int) -> Batch:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=random)
    labels = torch.randint(0, classes, (batch,), generator=random)
    return Batch((pixels,), Labels(labels), torch.ones(batch, dtype=torch.bool), torch.arange(batch))


class Repeated:
    """One batch again and again, as the loop's loader; keeps the seconds of each step."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self.batch, self.steps = batch, steps
        self.seconds: list[float] = []
        self.at_step: dict[int, Callable[[], None]] = {}

    def __len__(self) -> int:
        return self.steps

    def batches(self, start: int = 0) -> Iterator[Batch]:
        for step in range(start, self.steps):
            if step in self.at_step:
                self.at_step[step]()
            begun = time.perf_counter()
            yield self.batch
            self.seconds.append(time.perf_counter() - begun)

    def at(self, step: int) -> Batch:
        return self.batch


class Named:
    """Supervised, its parts named for the profiler."""

    def __init__(self, task: Supervised) -> None:
        self.task = task
        augmentation = task.augmentation
        task.augmentation = lambda *given: named("augment", augmentation, *given)  # type: ignore[assignment]

    def __call__(self, batch: Batch, seed: int) -> Any:
        return self.task(batch, seed)

    def after_backward(self, progress: Progress) -> None:
        self.task.after_backward(progress)

    def after_step(self, progress: Progress) -> None:
        self.task.after_step(progress)


def named(name: str, function: Callable[..., Any], *given: Any) -> Any:
    with record_function(name):
        return function(*given)


def train(model: str, size: int, classes: int, loader: Repeated, precision: str) -> nn.Module:
    """Our step, as users get it: `fit` on these batches."""
    made = zoo.create(model, image=(size, size), classes=classes, seed=0)

    def task(shared: nn.Module) -> Named:
        return Named(Supervised(shared, classes, made.preprocess, Augmentation(flip=False)))

    fit(
        made,
        task,
        loader,
        optimiser=OPTIMISER,
        schedule=Schedule(warmup=5),
        pace=Pace(precision=precision, evaluate_every=10**9, log_every=10**9, checks=1),  # type: ignore[arg-type]
        device=torch.device("cpu"),
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
