"""What `make demo` shows: pre-trained against random weights, `python bench/demo.py --seeds 0 1 2`, 4 minutes each.

Runs the command as `make demo` does and records what it found. The claim is at least 5 points over random weights and 3
over the best of what pixels alone give, both trainings together within 3 minutes on two cores; exit code 1 if not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import measure

OVER_SCRATCH, OVER_PIXELS, MOST_SECONDS = 5.0, 3.0, 3 * 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    settings, flags = parser.parse_known_args()
    runs = []
    for seed in settings.seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "vitrail", "demo", "--seed", str(seed), "--out", f"{folder}/demo", *flags]
            subprocess.run(command, check=True)
            runs.append({"seed": seed, **json.loads(Path(folder, "demo", "results.json").read_text())})
    reached = [held(run) for run in runs]
    for run in runs:
        seconds = sum(run["seconds"].values())
        print(
            f"seed {run['seed']}: {seconds:.0f} s of training, {run['steps']} steps each; "
            f"{run['over_random_weights']:+.1f} points over random weights, {run['over_pixels']:+.1f} over pixels"
        )
    claim = {"over_random_weights": OVER_SCRATCH, "over_pixels": OVER_PIXELS, "most_seconds": MOST_SECONDS}
    measure.write("demo", {"claim": claim, "reached": reached, "flags": flags, "runs": runs}, settings.out)
    return int(not all(reached))


def held(run: dict) -> bool:
    return (
        run["over_random_weights"] >= OVER_SCRATCH
        and run["over_pixels"] >= OVER_PIXELS
        and sum(run["seconds"].values()) <= MOST_SECONDS
    )


if __name__ == "__main__":
    sys.exit(main())
