"""What `vitrail fit` reaches: `python bench/photos.py dinov2s.pt imagenette-small`, 50 minutes on two cores.

The command itself is run, from its first import, with an empty cache of features. For each seed: the seconds until the first
answer lies in the run folder; the accuracy on the data's own validation pictures, which choose nothing, after each of
--minutes, beside scikit-learn's logistic regression on the same features (C, and whether to standardise, by
cross-validation); and, with some training labels swapped, how many of these are among the first suspects.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np

from vitrail.core.runs import read_json
from vitrail.data.splits import read
from vitrail.evaluation.means import mean_interval

SWAPPED, FIRST = 0.05, 0.1
OVER = 0.05
"""Of the minutes, for the last looks and the report of a machine that has become slower; planned are all minutes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("data", type=Path, help="a folder with train and val folders of class folders")
    parser.add_argument("--minutes", type=float, nargs="+", default=[3.0, 10.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--each", type=int, default=0, help="pictures a class and split, to try it out; 0: all")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = carry_out(asked, Path(name))
    for line in said(found):
        print(line)
    measure.write("photos", found, asked.out)
    return 0


def carry_out(asked: argparse.Namespace, work: Path) -> dict[str, Any]:
    data = copied(asked.data, work / "data", asked.each)
    runs, tuned, suspects = [], [], []
    for seed in range(asked.seeds):
        for minutes in asked.minutes:
            runs.append(fitted(asked.weights, data, minutes, seed, work))
            print(runs[-1], flush=True)
        tuned.append({"seed": seed, **logistic(work / "run", data, seed)})
        print(tuned[-1], flush=True)
        swapped = swap(copied(asked.data, work / f"swapped-{seed}", asked.each), seed)
        fitted(asked.weights, work / f"swapped-{seed}", 1.0, seed, work)
        suspects.append({"seed": seed, **recalled(work / "run", swapped, len(read(str(data))[0]["train"]))})
        print(suspects[-1], flush=True)
    baseline = mean([one["accuracy"] for one in tuned])
    after = {
        f"{minutes:g}": mean([run["accuracy"] for run in runs if run["minutes"] == minutes])
        for minutes in asked.minutes
    }
    bars = {
        "first answer within 60 s": max(run["first_answer_seconds"] for run in runs) <= 60,
        f"no run longer than its minutes by {OVER:.0%}": all(
            r["seconds"] <= 60 * (1 + OVER) * r["minutes"] for r in runs
        ),
        **{
            f"after {minutes} minutes no worse than logistic regression": one["mean"] >= baseline["mean"]
            for minutes, one in after.items()
        },
        "80 % of swapped labels among the first 10 % of suspects": min(one["share"] for one in suspects) >= 0.8,
    }
    return {
        "weights": asked.weights.name,
        "pictures": {split: len(source) for split, source in read(str(data))[0].items()},
        "runs": runs,
        "logistic_regression": tuned,
        "suspects": suspects,
        "accuracy": {"logistic regression": baseline, **{f"after {m} minutes": one for m, one in after.items()}},
        "bars": bars,
    }


def fitted(weights: Path, data: Path, minutes: float, seed: int, work: Path) -> dict[str, Any]:
    """One command, timed from its start."""
    for name in ("run", "cache"):
        shutil.rmtree(work / name, ignore_errors=True)
    command = [sys.executable, "-m", "vitrail", "fit", str(data), "--weights", str(weights)]
    command += ["--minutes", f"{minutes:g}", "--seed", str(seed), "--out", str(work / "run")]
    environment = {**os.environ, "VITRAIL_CACHE": str(work / "cache")}
    begun, first = time.perf_counter(), None
    with (work / "said.txt").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        while process.poll() is None:
            # The report is the last of the files but the one that is never read alone.
            if first is None and (work / "run/report.html").exists():
                first = time.perf_counter() - begun
            time.sleep(0.05)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise SystemExit((work / "said.txt").read_text())
    results, config = read_json(work / "run/results.json"), read_json(work / "run/config.json")
    assert first is not None
    return {
        "seed": seed,
        "minutes": minutes,
        "first_answer_seconds": round(first, 1),
        "seconds": round(seconds, 1),
        "size": config["settings"]["size"],
        "precision": config["settings"]["precision"],
        "head": results["head"],
        "kept": results["kept"],
        "comparison": results["comparison"],
        "training": results["training"],
        "first_accuracy": next(r["value"] for r in results["first_answer"] if r["name"].startswith("validation")),
        "accuracy": results["rows"][0]["value"],
        "low": results["rows"][0]["low"],
        "high": results["rows"][0]["high"],
        "count": results["rows"][0]["count"],
    }


def logistic(run: Path, data: Path, seed: int) -> dict[str, Any]:
    """scikit-learn on the features that the run's first answer read: the same backbone, size and precision."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    from vitrail.inference.features import extract
    from vitrail.weights.load import load

    model, sources = load(run / "first-answer"), read(str(data))[0]
    precision = read_json(run / "config.json")["settings"]["precision"]
    with torch.inference_mode():
        tables = {
            split: extract(model, sources[split], model.preprocess, precision=precision, workers=0)
            for split in ("train", "validation")
        }
    search = GridSearchCV(
        Pipeline([("scale", StandardScaler()), ("head", LogisticRegression(max_iter=2000))]),
        {"scale": [StandardScaler(), "passthrough"], "head__C": np.logspace(-5, 2, 15)},
        cv=StratifiedKFold(5, shuffle=True, random_state=seed),
    )
    search.fit(tables["train"].features.numpy(), tables["train"].labels.numpy())
    accuracy = search.score(tables["validation"].features.numpy(), tables["validation"].labels.numpy())
    scaled = search.best_params_["scale"] != "passthrough"
    return {"accuracy": 100 * accuracy, "c": float(search.best_params_["head__C"]), "standardised": scaled}


def copied(data: Path, to: Path, each: int) -> Path:
    """train and val as links to the pictures, all or `each` of a class."""
    for split in ("train", "val"):
        for folder in sorted((data / split).iterdir()):
            (to / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[: each or None]:
                (to / split / folder.name / file.name).symlink_to(file.resolve())
    return to


def swap(data: Path, seed: int) -> set[str]:
    """Moves a share of the training pictures into the folder of another class, and gives their names."""
    random = np.random.default_rng(seed)
    files = sorted((data / "train").glob("*/*"))
    classes = sorted(folder.name for folder in (data / "train").iterdir())
    names = set()
    for place in random.choice(len(files), round(SWAPPED * len(files)), replace=False).tolist():
        file = files[place]
        others = [name for name in classes if name != file.parent.name]
        to = data / "train" / others[int(random.integers(len(others)))] / file.name
        file.rename(to)
        names.add(f"{to.parent.name}/{to.name}")
    return names


def recalled(run: Path, swapped: set[str], count: int) -> dict[str, Any]:
    """How many of the swapped are among the first suspects of the training pictures, and among those called likely."""
    named = [one for one in read_json(run / "results.json")["suspects"] if one["pictures"] == "cross-validated"]
    short = ["/".join(Path(one["name"]).parts[-2:]) for one in named]
    first = set(short[: round(FIRST * count)]) & swapped
    likely = {name for name, one in zip(short, named, strict=True) if one["likely"]}
    return {
        "swapped": len(swapped),
        "found": len(first),
        "share": len(first) / len(swapped),
        "likely": len(likely),
        "likely_and_swapped": len(likely & swapped),
    }


def mean(values: list[float]) -> dict[str, float]:
    """Per cent, with their 95 % interval over seeds (Student's), which ends where per cent do."""
    middle, low, high = mean_interval(values)
    low, high = (middle if end is None else min(max(end, 0.0), 100.0) for end in (low, high))
    return {"mean": middle, "low": low, "high": high, "seeds": len(values)}


def said(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{name}: {one['mean']:.2f} % [{one['low']:.2f}, {one['high']:.2f}]" for name, one in found["accuracy"].items()
    ]
    return lines + [f"{'kept' if kept else 'MISSED'}: {bar}" for bar, kept in found["bars"].items()]


if __name__ == "__main__":
    sys.exit(main())
