"""Everything that is measured on a GPU, in one call of at most ten minutes: `python bench/gpu.py --out results`.

Training (bf16, compiled, fused optimiser, flash attention) and inference of ViT-B/16 and L/16, beside timm and
transformers where they are installed, under the same compile settings; the share of the measured and of the nominal matrix
rate; whether a step ever waits for the GPU; fp8 and int8 where torchao is installed. One JSON, written anew after each
part, so that a part which fails or comes too late costs only itself, as does a peer that fails.

    python bench/gpu.py --rehearse      the whole way on a CPU, at tiny sizes, in about a minute

Called again on the same machine and commit, it goes on with what failed or was left out for want of time.
"""

import argparse
import gc
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrail.benchmark import inference, peers, record, training
from vitrail.benchmark.alternation import alternate, ratio
from vitrail.benchmark.machine import machine, matrix_products, waiting
from vitrail.benchmark.subject import subject
from vitrail.weights import zoo

NOMINAL = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s that the makers state (SXM parts)."""
GOAL = 0.55
COMPILING = {"training": 4.0, "inference": 2.0}
"""Seconds that torch.compile takes for a block of a model, each model anew: a careful guess, not yet measured."""


class Sitting:
    """One call: what was found so far, and how much time is left."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.begun = time.monotonic()
        self.device = torch.device("cpu" if settings.rehearse else "cuda")
        self.path: Path = settings.out / ("gpu-rehearsal.json" if settings.rehearse else "gpu.json")
        self.found: dict[str, Any] = {"rehearsal": settings.rehearse, "parts": self.measured_before()}
        self.found |= {"failed": {}, "skipped": []}

    def measured_before(self) -> dict[str, Any]:
        """The parts of an earlier call on this machine and commit."""
        if self.settings.anew or not self.path.exists():
            return {}
        before, now = json.loads(self.path.read_text()), record.stamped("gpu", {})
        same = before["commit"] == now["commit"]
        same &= all(before["machine"][name] == now["machine"][name] for name in ("gpu", "torch"))
        return before["parts"] if same else {}

    def failed(self, name: str, error: Exception) -> None:
        self.found["failed"][name] = [f"{type(error).__name__}: {error}", *traceback.format_exc().splitlines()[-6:]]
        print(f"{name} FAILED", file=sys.stderr, flush=True)

    def part(self, name: str, work: Callable[[], Any], least: float) -> None:
        """Does it if `least` seconds are left; what goes wrong is written down and the rest goes on."""
        if name in self.found["parts"]:
            return
        left = 60 * self.settings.minutes - (time.monotonic() - self.begun)
        begun = time.monotonic()
        if left < least:
            self.found["skipped"].append(f"{name}: {left:.0f} s were left, {least:.0f} are needed")
        else:
            try:
                self.found["parts"][name] = work()
            except Exception as error:
                self.failed(name, error)
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        torch.compiler.reset()
        gc.collect()  # a step and its model know each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.write()

    def write(self) -> None:
        settings = self.settings
        command = "python bench/gpu.py" + " --rehearse" * settings.rehearse
        if settings.compiled == settings.rehearse:  # not the default
            command += " --compiled" if settings.compiled else " --no-compiled"
        seconds = round(time.monotonic() - self.begun, 1)
        record.write(self.path, record.stamped("gpu", {"command": command, "seconds": seconds, **self.found}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=None, help="torch.compile")
    parser.add_argument("--anew", action="store_true", help="measure again what is there already")
    parser.add_argument("--models", nargs="+", help="of ViT-B/16 and ViT-L/16")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins that may need more than is left")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    settings = parser.parse_args()
    if not settings.rehearse and not torch.cuda.is_available():
        print("No CUDA device is here; give --rehearse to try the way on a CPU.", file=sys.stderr)
        return 2
    small = settings.rehearse
    settings.rounds = settings.rounds or (2 if small else 15)
    settings.compiled = settings.compiled if settings.compiled is not None else not small
    if not small:
        torch.set_float32_matmul_precision("high")
    sitting = Sitting(settings)
    models = {"ViT-Nano/16": (2, 32)} if small else {"ViT-B/16": (256, 224), "ViT-L/16": (128, 224)}
    if unknown := set(settings.models or ()) - models.keys():
        print(f"--models {unknown.pop()} is not known; give one or several of {', '.join(models)}.", file=sys.stderr)
        return 2
    models = {name: models[name] for name in settings.models or models}
    found = libraries()
    sitting.part("matrix", lambda: matrix(sitting), 0)
    for place, (name, (batch, side)) in enumerate(models.items()):
        given: Any = (sitting, name, batch, side)
        sides = 1 + len(found)
        sitting.part(f"no waiting {name}", lambda g=given: no_waiting(*g), needed(sitting, name, "training", 0))
        sitting.part(f"training {name}", lambda g=given: train(*g), needed(sitting, name, "training", sides + 1))
        # Ours is compiled twice: for pixels, when its answers are compared, and for pictures.
        sitting.part(f"inference {name}", lambda g=given: infer(*g), needed(sitting, name, "inference", sides + 1))
        if place == 0:  # of the smaller model: the larger one's parts may take what is left
            sitting.part("quantised", lambda g=given: quantised(*g), needed(sitting, name, "inference", 3))
    print(json.dumps({**sitting.found, "machine": machine()}, indent=1)[:6000])
    print(f"written: {sitting.path}", file=sys.stderr)
    return int(bool(sitting.found["failed"]))


def needed(sitting: Sitting, name: str, kind: str, sides: int) -> float:
    """Seconds that a part may take at most: so many models are compiled, the rest is measuring."""
    if sitting.settings.rehearse:
        return 0
    compiling = COMPILING[kind] * zoo.config(name).depth * sides if sitting.settings.compiled else 0
    return 30 + compiling


def libraries() -> list[str]:
    found = []
    for name in peers.PEERS:
        try:
            found += [name] if importlib.util.find_spec(name) and importlib.import_module(name) else []
        except (ImportError, RuntimeError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


def matrix(sitting: Sitting) -> dict[str, Any]:
    """Measured products in each precision, on random data, and the nominal bf16 rate. What torch calls "high" is TF32."""
    products = matrix_products(sitting.device, ("fp32", "bf16", "int8"), 128 if sitting.settings.rehearse else 0)
    seconds = alternate(products.sides, rounds=sitting.settings.rounds, finish=waiting(sitting.device))
    rates = {("tf32" if name == "fp32" else name): rate for name, rate in products.rates(seconds).items()}
    sitting.found["matrix"] = rates
    name = torch.cuda.get_device_name() if sitting.device.type == "cuda" else ""
    nominal = next((rate for kind, rate in NOMINAL.items() if kind in name), None)
    return {"flops_a_second": rates, "nominal_bf16": nominal, "device": name or "cpu"}


def train(sitting: Sitting, name: str, batch: int, side: int) -> dict[str, Any]:
    """A step of each library in turns: model FLOPs utilisation and ratios to ours; peak memory. "vitrail fresh" brings
    each batch from the host, as the loop does."""
    compiled, device = sitting.settings.compiled, sitting.device
    sides, peaks = {}, {}
    for library in ("vitrail", "vitrail fresh", *libraries()):
        model = subject(name, side)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what ran before, in other parts too, is not this side's
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        try:
            who, fresh = library.split()[0], library.endswith(" fresh")
            made = training.side(who, model, batch, device, "bf16", compile=compiled, fresh=fresh)
            for _ in range(3):  # compiles, and finds the kernels
                made()
        except Exception as error:
            if library == "vitrail":
                raise
            sitting.failed(f"training {name}, {library}", error)
            continue
        sides[library] = made
        peaks[library] = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
    products = matrix_products(device, ("bf16",), 128 if sitting.settings.rehearse else 0)
    seconds = alternate(
        {**sides, **products.sides}, rounds=sitting.settings.rounds, shortest=0.2, finish=waiting(device)
    )
    flops, rate = training.flops(model, batch), products.rates(seconds)["bf16"]
    nominal = sitting.found["parts"].get("matrix", {}).get("nominal_bf16")
    return {
        "batch": batch,
        "compiled": compiled,
        "matrix_bf16": rate,
        "sides": {library: shares(seconds[library], batch, flops, rate, nominal, peaks[library]) for library in sides},
        "ratios": {lib: vars(ratio(seconds[lib], seconds["vitrail"])) for lib in sides if lib != "vitrail"},
        "goal": GOAL,
        "done_of_counted": training.done(model),
    }


def shares(
    times: list[float], batch: int, flops: float, rate: float, nominal: float | None, peak: int | None
) -> dict[str, Any]:
    middle = sorted(times)[len(times) // 2]
    return {
        "seconds": times,
        "pictures_a_second": batch / middle,
        "utilisation_of_measured": flops / middle / rate,
        "utilisation_of_nominal": None if nominal is None else flops / middle / nominal,
        "peak_bytes": peak,
    }


def no_waiting(sitting: Sitting, name: str, batch: int, side: int) -> dict[str, Any]:
    """Our step under torch's check for calls that make the processor wait for the GPU; the first such is an error."""
    model = subject(name, side)
    given = training.batch_of(model.preprocess, batch, model.config.classes)
    step = training.vitrail_step(model, given, sitting.device, "bf16", compile=False)
    for _ in range(2):
        step()
    if sitting.device.type != "cuda":
        return {"checked": False, "why": "there is no GPU"}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"checked": True, "steps": 3}


def infer(sitting: Sitting, name: str, batch: int, side: int) -> dict[str, Any]:
    """Forward passes: ours eager and compiled, and the peers', in bf16."""
    found = libraries()
    engines = ("eager", "compile") if sitting.settings.compiled else ("eager",)
    wanted = inference.names(
        engines, ("bf16",), tuple(found), compiled=sitting.settings.compiled, device=str(sitting.device)
    )
    wanted = [one for one in wanted if "by-hand" not in one and "fp32" not in one]
    work = inference.Work(name, batch, side, torch.get_num_threads(), str(sitting.device))
    model = work.build()
    sides = {}
    for one in wanted:
        try:
            sides[one] = inference.side(one, work, model, tuple(found))[0]
            sides[one]()
        except Exception as error:
            sides.pop(one, None)
            sitting.failed(f"inference {name}, {one}", error)
    if not any(one.startswith("vitrail") for one in sides):
        raise RuntimeError("none of our own sides ran")
    products = matrix_products(sitting.device, ("bf16",), 128 if sitting.settings.rehearse else 0)
    # The sides' answers are on the host already, the products are not.
    seconds = alternate(
        {**sides, **products.sides}, rounds=sitting.settings.rounds, shortest=0.2, finish=waiting(sitting.device)
    )
    rate = products.rates(seconds)["bf16"]
    flops = 2.0 * model.config.backbone.macs() * batch
    ours = min((one for one in sides if one.startswith("vitrail")), key=lambda one: sum(seconds[one]))
    return {
        "batch": batch,
        "sides": {one: shares(seconds[one], batch, flops, rate, None, None) for one in sides},
        "fastest_of_ours": ours,
        "done_of_counted": training.done(model),
        "ratios": {one: vars(ratio(seconds[one], seconds[ours])) for one in sides if not one.startswith("vitrail")},
    }


def quantised(sitting: Sitting, name: str, batch: int, side: int) -> dict[str, Any]:
    """fp8 and int8 by torchao beside bf16, compiled all three; without torchao, that is said."""
    if importlib.util.find_spec("torchao") is None:
        return {"measured": False, "why": "torchao is not installed"}
    from torchao import quantization

    kinds = {
        "fp8": quantization.Float8DynamicActivationFloat8WeightConfig,
        "int8": quantization.Int8DynamicActivationInt8WeightConfig,
    }
    work = inference.Work(name, batch, side, torch.get_num_threads(), str(sitting.device))
    images = work.pictures(work.build()).bfloat16()
    sides, missing, answers = {}, {}, {}
    for kind in ("bf16", *kinds):
        model: nn.Module = work.build().to(sitting.device).bfloat16()
        try:
            if kind != "bf16":
                quantization.quantize_(model, kinds[kind]())
            ask = torch.compile(model) if sitting.settings.compiled else model

            def call(ask: Any = ask) -> torch.Tensor:
                with torch.no_grad():  # torchao's tensors know no inference mode
                    return ask(images).float().cpu()

            answers[kind] = call()
            sides[kind] = call
        except Exception as error:
            missing[kind] = f"{type(error).__name__}: {str(error)[:300]}"
    seconds = alternate(sides, rounds=sitting.settings.rounds, shortest=0.2)
    same = answers["bf16"]
    return {
        "measured": True,
        "missing": missing,
        "pictures_a_second": {one: batch / sorted(times)[len(times) // 2] for one, times in seconds.items()},
        "ratios_to_bf16": {one: vars(ratio(seconds["bf16"], times)) for one, times in seconds.items()},
        "relative_error": {one: float((a - same).norm() / same.norm().clamp(min=1e-9)) for one, a in answers.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
