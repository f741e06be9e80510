"""The files of examples/, run as a person runs them."""

import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from processes import Nursery

from vitrail.commands.train import read_recipe
from vitrail.core.types import Source
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.transforms import Transform
from vitrail.experiments.recipe import Recipe, flat, with_settings

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_recipe", raising=False)
    return read_recipe(str(EXAMPLES / "my_recipe.py"))


def test_a_recipe_of_ones_own_trains_and_learns(tmp_path: Path) -> None:
    file = str(EXAMPLES / "my_recipe.py")
    code, _, error = Nursery(tmp_path).run("run", file, "--steps", 60, "--workers", 2, "--out", "shapes")
    assert code == 0, error
    results = json.loads((tmp_path / "shapes" / "results.json").read_text())
    assert results["steps"] == 60
    headline = results["rows"][0]
    assert headline["count"] == 600
    assert headline["value"] > 45, "a third would be chance, and after 60 steps about two thirds are right"
    assert {"model.safetensors", "config.json", "metrics.jsonl", "report.html"} <= {
        file.name for file in (tmp_path / "shapes").iterdir()
    }


def test_its_source_is_one_and_is_the_same_in_spawned_workers(recipe: Recipe) -> None:
    assert recipe.own.splits is not None
    assert recipe.own.preprocess is not None
    source = recipe.own.splits.train
    assert isinstance(source, Source)
    transform, order = Transform(recipe.own.preprocess), Order(len(source), 16, 48, seed=3)
    here = list(PictureLoader(source, transform, order, workers=0))
    there = list(PictureLoader(source, transform, order, workers=2, start_method="spawn"))
    assert len(here) == len(there) == 3
    for one, other in zip(here, there, strict=True):
        assert np.array_equal(one.views[0], other.views[0])
        assert one.targets is not None
        assert other.targets is not None
        assert one.targets.values.tolist() == other.targets.values.tolist() == [i % 3 for i in one.index.tolist()]


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.toml")))
def test_a_file_of_settings_names_settings_that_there_are(name: str) -> None:
    settings = tomllib.loads((EXAMPLES / name).read_text())
    recipe = flat(with_settings(Recipe(), settings, name))
    assert recipe["data"]


def test_the_example_from_scratch_is_what_the_bench_runs() -> None:
    recipe = flat(with_settings(Recipe(), tomllib.loads((EXAMPLES / "from_scratch.toml").read_text()), "its file"))
    assert recipe["data"] == "sample:fashion"
    assert "from_scratch.toml" in (EXAMPLES.parent / "bench" / "from_scratch.py").read_text()
