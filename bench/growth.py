"""How a training step's time and memory grow, beside the formula: `python bench/growth.py --plot growth.png`.

Against tokens (pictures of 224 to 1536 pixels), batch, depth and width. Each point is a process of its own. The memory's
formula is `vitrail bench training --plan`'s, which counts a step's tensors without computing; the time's is FLOPs over the
measured matrix rate, times one constant, the share of it that the smallest point of its series reaches. Where a point lies
above its line, something beside matrix products grows (attention's softmax, what leaves the caches).

The claim is on memory: within 10 % at every point. Exit code 1 if not. About 30 minutes; --quick is two points a series.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from vitrail.benchmark import planning, record, training
from vitrail.benchmark.alternation import alternate
from vitrail.benchmark.machine import matrix_products, pinned
from vitrail.experiments.costs import resident
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.vit import ViTConfig

CLOSE = 0.10
START: dict[str, Any] = {
    "size": 224,
    "batch": 8,
    "depth": 12,
    "width": 384,
    "precision": "bf16",
    "checkpointing": False,
}
SERIES: dict[str, list[Any]] = {
    "size": [224, 384, 512, 768, 1024, 1536],
    "batch": [1, 4, 8, 16, 32],
    "depth": [3, 6, 12, 24],
    "width": [192, 384, 768, 1024],
}
FEWER = {"size": {"batch": 1}}
"""Where START's batch would not fit."""
BESIDE: list[dict[str, Any]] = [
    {"precision": "fp32"},
    {"checkpointing": True},
    {"checkpointing": True, "batch": 32},
    {"precision": "fp32", "checkpointing": True},
    {"precision": "fp32", "batch": 32, "checkpointing": True},
    {"precision": "fp32", "size": 384, "batch": 4, "checkpointing": True},
]
"""Points off the series, for the claim on memory alone."""
LABELS = {"size": "patches of a picture", "batch": "pictures in a step", "depth": "blocks", "width": "width"}


def config(point: dict[str, Any]) -> ClassifierConfig:
    width = point["width"]
    image = (point["size"], point["size"])
    return ClassifierConfig(ViTConfig(width, point["depth"], width // 64, 4 * width, (16, 16), image), 1000)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*SERIES, "beside"], action="append", help="some of the series")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=START["precision"], help="of all series")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peaks", type=int, default=3, help="processes a point, of whose peaks the median counts")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "growth.json")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.point:
        return measure(json.loads(settings.point), settings.rounds, settings.threads)

    series: dict[str, list[dict[str, Any]]] = {}
    wanted = settings.only or [*SERIES, "beside"]
    for name, values in SERIES.items():
        if name in wanted:
            chosen = values[:2] if settings.quick else values
            start = {**START, "precision": settings.precision, **FEWER.get(name, {})}
            points = [{**start, name: value} for value in chosen]
            series[name] = [found(point, x(name, point), settings) for point in points]
            first = series[name][0]
            # The share of the matrix rate that the first point reaches, held for all of them.
            share = first["flops"] / first["rate"] / first["seconds"]
            for each in series[name]:
                each["seconds_formula"] = each["flops"] / each["rate"] / share
    measured = [point["settings"] for points in series.values() for point in points]
    others = [{**START, "precision": settings.precision, **change} for change in BESIDE] if "beside" in wanted else []
    beside = [found(point, 0, settings) for point in others if point not in measured]
    every = [*(point for points in series.values() for point in points), *beside]
    worst = max(every, key=lambda point: abs(point["bytes_formula"] / point["bytes"] - 1))
    off = worst["bytes_formula"] / worst["bytes"] - 1
    print(f"memory: {len(every)} points, the worst {off:+.1%} (limit {CLOSE:.0%})")
    command = f"python bench/growth.py --precision {settings.precision}" + " --quick" * settings.quick
    command += f" --rounds {settings.rounds} --peaks {settings.peaks} --threads {settings.threads}"
    written = {"command": command, "worst": off, "limit": CLOSE, "series": series, "beside": beside}
    record.write(settings.out, record.stamped("growth", written))
    if settings.plot and series:
        from vitrail.analysis.figures import save
        from vitrail.analysis.figures_speed import growth

        save(growth(series, LABELS), settings.plot)
    return int(abs(off) > CLOSE)


def x(name: str, point: dict[str, Any]) -> float:
    return float((point["size"] // 16) ** 2 if name == "size" else point[name])


def found(point: dict[str, Any], place: float, settings: argparse.Namespace) -> dict[str, Any]:
    """One point: measured in processes of its own, and what the formulas say of it. Peaks differ from one process to the
    next, with what the allocator has where: by up to 13 % with checkpointing in fp32."""
    runs = []
    for rounds in (settings.rounds, *[0] * (settings.peaks - 1)):
        command = [sys.executable, __file__, "--point", json.dumps(point)]
        command += ["--rounds", str(rounds), "--threads", str(settings.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{point}: {done.stderr[-2000:]}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    peaks = [run["bytes"] for run in runs]
    measured = {**runs[0], "bytes": int(statistics.median(peaks)), "peaks": peaks}
    made = config(point)
    said = planning.needed(made, point["batch"], point["precision"], point["checkpointing"])
    says = f"{measured['bytes'] / 2**20:,.0f} MiB, formula {said / 2**20:,.0f} ({said / measured['bytes'] - 1:+.1%})"
    print(f"{point}: {measured['seconds']:.3f} s, {says}", flush=True)
    return {"x": place, "settings": point, **measured, "bytes_formula": said}


def measure(point: dict[str, Any], rounds: int, threads: int) -> int:
    """Prints bytes at the peak of this process, and in so many rounds the seconds of a step, as JSON."""
    with pinned(threads):
        model = config(point).build()
        model.backbone.checkpointing = point["checkpointing"]
        batch = training.batch_of(model.preprocess, point["batch"], 1000)
        step = training.vitrail_step(
            model, batch, torch.device("cpu"), point["precision"], optimiser=planning.OPTIMISER
        )
        step()
        step()
        peak = resident("VmHWM")  # before the matrices below
        if not rounds:
            print(json.dumps({"bytes": peak}))
            return 0
        products = matrix_products(torch.device("cpu"), (point["precision"],))
        seconds = alternate({"step": step, **products.sides}, rounds=rounds, shortest=0.0)
    rate = products.rates(seconds)[point["precision"]]
    times = sorted(seconds["step"])
    step_flops = training.flops(model, point["batch"]) * (4 / 3 if point["checkpointing"] else 1)
    print(json.dumps({"seconds": times[len(times) // 2], "bytes": peak, "rate": rate, "flops": step_flops}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
