"""Our training step beside timm's and transformers': `PYTHONPATH=bench/peers python bench/training_peers.py`.

Each side: normalise uint8 pictures, forward, softmax loss, backward, fused AdamW, zero the gradients, in bf16 autocast on
the same batch; ours is the training loop's own step. "timm, map written out" is timm with its fused attention switched
off (TIMM_FUSED_ATTN=0), which on a CPU in bf16 is its best setting. All sides take turns in one process on pinned cores;
a ratio is of medians over the rounds, its interval a bootstrap of whole rounds; peak memory is of a process of its own.
The share is of the machine's measured matrix rate, by the usual count of a whole model's FLOPs (three forward passes).
Our last block leaves out what the class token does not need, so that it computes about 6 % fewer than that count:
`executed_share` is by what it does compute.

How timm is installed for this: bench/peers/README.md. About 25 minutes on two cores; --quick: 2, and no more than a hint.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

from vitrail.benchmark.alternation import Side, alternate, ratio
from vitrail.benchmark.machine import Others, matrix_rates, matrix_sides, pinned
from vitrail.benchmark.training import batch_of, flops, peer_step, vitrail_step
from vitrail.models.classifier import Classifier
from vitrail.weights import zoo

CASES = {
    "ViT-S/16, 224 px, batch 8": ("ViT-S/16", 224, 8),
    "ViT-S/16, 224 px, batch 32": ("ViT-S/16", 224, 32),
    "ViT-Ti/4, 32 px, batch 128": ("ViT-Ti/4", 32, 128),
}
OURS, BEST = "vitrail", "timm, map written out"
SIDES = (OURS, "timm", BEST, "transformers")
CPU = torch.device("cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), help=f"of: {'; '.join(CASES)}")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), help=f"of: {'; '.join(SIDES)}")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--compile", action="store_true", help="all sides through torch.compile (needs g++)")
    parser.add_argument("--threads", type=int, default=0, help="cores; 0: all")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="3 rounds, no peak memory")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    settings = parser.parse_args()
    if settings.quick:
        settings.rounds = 3
    with pinned(settings.threads) as threads:
        if settings.peak_of:
            side = make(settings.peak_of, settings.cases[0], settings.precision, settings.compile)
            for _ in range(3):
                side()
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            return 0
        others = Others()
        found: dict[str, Any] = {"threads": threads, "rounds": settings.rounds, "compiled": settings.compile}
        found["precision"] = settings.precision
        for name in settings.cases:
            found[name] = compare(name, settings)
        found["machine_was"] = others.result()
        print(Others.sentence(found["machine_was"]))
    measure.write(f"training_peers{'_compiled' if settings.compile else ''}_{settings.precision}", found, settings.out)
    behind = [name for name in settings.cases for other in found[name]["faster_than"].values() if other["low"] <= 1]
    return int(bool(behind))


def compare(name: str, settings: argparse.Namespace) -> dict[str, Any]:
    sides = {side: make(side, name, settings.precision, settings.compile) for side in settings.sides}
    products, work = matrix_sides(CPU, (settings.precision,))
    seconds = alternate({**sides, **products}, rounds=settings.rounds, each=lambda done: print(".", end="", flush=True))
    rate = matrix_rates(seconds, work)[settings.precision]
    count = flops(classifier(name), CASES[name][2])
    print(
        f"\n{name}; matrix products {rate / 1e9:.0f} GFLOP/s\n\n| | s a step | GFLOP/s | share | peak GiB | ours is |"
    )
    print("|---|---|---|---|---|---|")
    rows: dict[str, Any] = {}
    faster: dict[str, Any] = {}
    for side in sides:
        median = float(np.median(seconds[side]))
        peak = None if settings.quick else peak_memory(side, name, settings)
        rows[side] = {"seconds": median, "rate": count / median, "share": count / median / rate, "peak_bytes": peak}
        times = ""
        if side != OURS and OURS in sides:
            how = ratio(seconds[side], seconds[OURS])
            faster[side] = {"value": how.value, "low": how.low, "high": how.high}
            times = f"{how.value:.3f} [{how.low:.3f}, {how.high:.3f}] times as fast"
        memory = "" if peak is None else f"{peak / 2**30:.2f}"
        print(
            f"| {side} | {median:.3f} | {count / median / 1e9:.0f} | {count / median / rate:.0%} | {memory} | {times} |"
        )
    if OURS in rows:
        rows[OURS]["executed_share"] = rows[OURS]["share"] * executed(name)
    return {"matrix_rate": rate, "flops": count, "sides": rows, "faster_than": faster, "seconds": seconds}


def classifier(name: str) -> Classifier:
    model, size, _ = CASES[name]
    return zoo.create(model, classes=1000, image=(size, size), seed=0)


def make(side: str, name: str, precision: Any, compiled: bool) -> Side:
    model = classifier(name)
    batch = batch_of(model.preprocess, CASES[name][2], 1000)
    if side == OURS:
        return vitrail_step(model, batch, CPU, precision, compile=compiled)
    if side != BEST:
        return peer_step(side, model, batch, CPU, precision, compile=compiled)
    import timm.layers

    timm.layers.set_fused_attn(False)
    try:
        return peer_step("timm", model, batch, CPU, precision, compile=compiled)
    finally:
        timm.layers.set_fused_attn(True)


def executed(name: str) -> float:
    """The share of the model's multiply-accumulates that our step computes: of the last block's tokens, only the class
    token goes on from the attention map."""
    config = classifier(name).config.backbone
    t, d, m = config.tokens(), config.width, config.mlp  # type: ignore[union-attr]
    skipped = (t - 1) * (d * d + 2 * d * m + 2 * t * d)
    return 1 - skipped / config.macs()


def peak_memory(side: str, name: str, settings: argparse.Namespace) -> int:
    """Bytes, at most, of a process that does nothing else."""
    command = [sys.executable, __file__, "--peak-of", side, "--cases", name, "--precision", settings.precision]
    command += ["--threads", str(settings.threads), *(["--compile"] if settings.compile else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(main())
