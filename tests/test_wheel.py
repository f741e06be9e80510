"""The wheel: small, whole, and at work in a folder that knows nothing of the checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
MOST_BYTES = 15 * 2**20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout keeps no build folder and lends none of its own leftovers."""
    copy = tmp_path_factory.mktemp("source")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT / "src", copy / "src", ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True)
    return target


def outside(installed: Path, place: Path, *arguments: str) -> str:
    """Runs Python in `place`, where the installed wheel comes before the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_small_and_whole(wheel: Path) -> None:
    assert wheel.stat().st_size <= MOST_BYTES
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        metadata = next(packed.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    known = subprocess.run(
        ["git", "ls-files", "vitrail"], cwd=ROOT / "src", capture_output=True, text=True, check=False
    )
    there = [path for path in known.stdout.splitlines() if (ROOT / "src" / path).exists()]
    assert [path for path in there if path not in names] == []
    assert {"vitrail/py.typed", "vitrail/data/samples/fashion.md", "vitrail/data/samples/fashion.LICENSE"} <= names
    assert {f"vitrail/data/samples/fashion-{split}.parquet" for split in ("train", "test")} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "bench/")) for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "Requires-Dist: torch<2.14,>=2.11" in metadata
    assert "vitrail train --data photos/" in metadata, "the README is the package's page"


def test_it_trains_and_predicts_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = outside(installed, tmp_path, "-c", "import vitrail; print(vitrail.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    Image.fromarray(np.full((40, 30, 3), 200, np.uint8)).save(tmp_path / "plain.png")

    train = ["train", "--data", "sample:fashion", "--limit", "40", "--steps", "2", "--batch", "8", "--out", "run"]
    said = outside(installed, tmp_path, "-m", "vitrail", *train, "--model", "ViT-Nano/14")
    assert "next: vitrail predict run PICTURE" in said
    said = outside(installed, tmp_path, "-m", "vitrail", "predict", "run", "plain.png", "--json", "--top", "10")
    (answer,) = json.loads(said)
    assert "plain.png" in str(answer)
    assert "Ankle boot" in str(answer)
