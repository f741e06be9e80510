"""Loads a full-size official .npz and compares time and peak memory with NumPy reading all its arrays.

    python bench/load_large.py [--name ViT-B/16] [--repeats 5] [--file KEEP.npz]

The file holds random weights with the head of the ImageNet-21k files (21,843 classes, a hidden layer): ViT-B/16 is 394 MiB,
ViT-H/14 2.5 GiB. Each measurement is a process of its own, over a file that is in the page cache; the best of all counts.
Expected on 2 idle cores: at most 1.5 times NumPy's time, and at most 1.3 times the file in memory beyond the interpreter's
own. Found: ViT-B/16 1.34 (0.46 s for 0.34 s) and 1.24; ViT-H/14, beside a busy core, 1.53 and 1.07 (3.1 GB in all).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from vitrail.models.classifier import ClassifierConfig
from vitrail.weights import official, zoo

MEASURE = """
import json, re, sys, time
import numpy as np, torch
import vitrail.weights.big_vision, vitrail.weights.load, vitrail.weights.official
task, path = sys.argv[1:]
start = time.perf_counter()
if task == "numpy":
    with np.load(path) as file:
        kept = [file[name] for name in file.files]
elif task == "vitrail":
    kept = vitrail.weights.load.load(path)
seconds = time.perf_counter() - start
# Not getrusage: its peak is inherited from the process that started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps([seconds, peak]))
"""


def measure(task: str, path: Path) -> tuple[float, int]:
    """Seconds, and the peak of resident memory in bytes, of one fresh process."""
    done = subprocess.run([sys.executable, "-c", MEASURE, task, str(path)], check=True, capture_output=True, text=True)
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


def make(name: str, path: Path) -> None:
    config = ClassifierConfig(zoo.config(name), 21_843, hidden=zoo.config(name).width)
    model = config.build(seed=0)
    torch.nn.init.normal_(model.head.output.weight, generator=torch.Generator().manual_seed(1))
    official.write(model, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="ViT-B/16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--file", type=Path, help="where to keep the file; one that is there already is used")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder) / "large.npz"
        if not path.exists():
            make(options.name, path)
        size = path.stat().st_size
        path.read_bytes()  # into the page cache
        found = {
            task: [measure(task, path) for _ in range(options.repeats)] for task in ("numpy", "vitrail", "nothing")
        }
    own = min(peak for _, peak in found["nothing"])
    theirs, ours = (min(seconds for seconds, _ in found[task]) for task in ("numpy", "vitrail"))
    peak = max(peak for _, peak in found["vitrail"]) - own
    print(f"{size / 1e6:.0f} MB on {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    print(f"time    NumPy {theirs:.2f} s, vitrail.load {ours:.2f} s: {ours / theirs:.2f} times (at most 1.5)")
    share = peak / size
    print(
        f"memory  {peak / 1e6:.0f} MB beyond the interpreter's {own / 1e6:.0f} MB: {share:.2f} times the file (at most 1.3)"
    )


if __name__ == "__main__":
    main()
