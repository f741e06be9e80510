"""What is planned, and what a person set and so stays as it is."""

import os
from pathlib import Path

import numpy as np
import pytest

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess, Sample
from vitrail.experiments.costs import picture_sizes
from vitrail.experiments.plan import OF_WEIGHTS, DataFacts, Machine, change, pair, plan, plan_length, samples, steps
from vitrail.experiments.recipe import RANGES, Recipe, check, flat, with_settings
from vitrail.training.optim import Optimiser
from vitrail.weights import zoo

SMALL = DataFacts(pictures=10_000, classes=10, height=28, width=28)
LARGE = DataFacts(pictures=3_000, classes=5, height=480, width=640)
CPU = Machine("cpu", 2, 8 << 30, fast_bf16=False)
GPU = Machine("cuda", 16, 80 << 30, fast_bf16=True)


@pytest.mark.parametrize("facts", [SMALL, LARGE])
@pytest.mark.parametrize("machine", [CPU, GPU])
def test_everything_is_planned(facts: DataFacts, machine: Machine) -> None:
    planned, said = plan(Recipe(), facts, machine)
    planned, more = plan_length(planned, facts, machine, 0.1, 1.0)
    settings = flat(planned)
    assert "planned" not in settings.values()
    for name in ("rate", "batch", "epochs"):
        assert settings[name] > 0, name
    assert settings["warmup"] >= 0
    assert settings["workers"] >= 0
    assert said
    assert more
    assert all(side % patch == 0 for side, patch in zip(pair(planned.data.size), (1, 1), strict=True))
    # Pure, and settled: planning again changes nothing.
    assert plan(Recipe(), facts, machine)[0] == plan(Recipe(), facts, machine)[0]
    assert plan(planned, facts, machine)[0] == planned


def test_what_was_set_is_kept() -> None:
    given = {
        **{"model": "ViT-S/8", "size": [32], "pool": "class", "positions": "learned", "batch": 33, "workers": 3},
        **{"rate": 0.5, "precision": "bf16", "crop": "inception", "epochs": 7.0, "warmup": 5, "flip": False},
    }
    recipe = with_settings(Recipe(), given, "test")
    planned, _ = plan(recipe, SMALL, CPU)
    planned, said = plan_length(planned, SMALL, CPU, 0.1, 1.0)
    assert {name: flat(planned)[name] for name in given} == given
    assert flat(planned)["shift"] == 0
    assert not said


def test_starting_from_weights() -> None:
    planned, _ = plan(Recipe(), LARGE, GPU, (768, Preprocess(size=(224, 192))))
    assert planned.data.size == (224, 192)
    assert planned.model.pool == planned.model.positions == "planned"  # the weights have their own
    assert planned.optimiser.rate < plan(change(Recipe(), "model", model="ViT-B/16"), LARGE, GPU)[0].optimiser.rate


@pytest.mark.parametrize(
    ("model", "pictures", "size"),
    [
        ("ViT-S/14", 400, (140, 140)),
        ("ViT-Ti/16", 400, (128, 128)),
        ("R26+ViT-S/32", 400, (128, 128)),
        ("BiT-R50x1", 400, (128, 128)),
        ("ViT-Nano/7", 28, (28, 28)),
        ("ViT-Nano/8", 28, (32, 32)),
    ],
)
def test_the_planned_size_is_one_that_the_models_patches_fill(model: str, pictures: int, size: tuple[int, int]) -> None:
    facts = DataFacts(500, 10, pictures, pictures)
    recipe, _ = plan(with_settings(Recipe(), {"model": model}, "the test"), facts, CPU)
    assert recipe.data.size == size
    zoo.config(model, image=size)


def test_minutes_become_epochs() -> None:
    recipe = change(Recipe(), "data", batch=100)
    found = []
    for minutes in (1.0, 2.0, 10.0):
        asked = change(recipe, "length", minutes=minutes)
        planned, _ = plan_length(asked, SMALL, CPU, step_seconds=0.1, epoch_seconds=2.0)
        found.append(planned.length.epochs)
    # 100 steps of 0.1 s and an evaluation of 2 s: 12 s an epoch.
    assert found == [5, 10, 50]


LENGTHS = [
    ({"steps": 7}, (700, 7)),
    ({"epochs": 2.0}, (20_000, 200)),
    ({"epochs": 0.0105}, (105, 2)),
    ({"steps": 3, "epochs": 9.0}, (300, 3)),
]


@pytest.mark.parametrize(("length", "expected"), LENGTHS)
def test_the_first_length_counts(length: dict, expected: tuple[int, int]) -> None:
    recipe = change(change(Recipe(), "data", batch=100), "length", **length)
    assert (samples(recipe, SMALL), steps(recipe, SMALL)) == expected


def test_each_number_has_a_range_and_each_default_lies_in_it() -> None:
    check(Recipe())
    settings = flat(Recipe())
    assert set(RANGES) <= set(settings)
    numbers = {
        name for name, value in settings.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    assert numbers - set(RANGES) == {"validation", "head_bias"}  # one has its own check; the other may be any number
    for name, (low, high) in RANGES.items():
        for value in [low - 1] + ([] if high is None else [high + 1]):
            wrong = [value, value] if isinstance(settings[name], list) else value
            with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is"):
                check(with_settings(Recipe(), {name: wrong}, "test"))
    for name in ("rate", "epochs"):
        for value in (float("nan"), float("inf")):
            with pytest.raises(UserError, match=f"--{name} is"):
                check(with_settings(Recipe(), {name: value}, "test"))


@pytest.mark.parametrize(
    "setting", [{"head": "keep"}, {"heads": 6}, {"grid": [14, 14]}, {"preprocess": "imagenet,size=224"}]
)
def test_what_is_said_about_weights_needs_weights(setting: dict) -> None:
    (name,) = setting
    with pytest.raises(UserError, match=f"--{name} is about --weights, and none were given; leave it out"):
        check(with_settings(Recipe(), setting, "test"))
    check(with_settings(change(Recipe(), "model", weights=Path("w")), setting, "test"))
    default = {name: flat(Recipe())[name]}
    check(with_settings(Recipe(), default, "test"))


@pytest.mark.parametrize("setting", [{"pool": "mean"}, {"representation": 32}, {"head_bias": -4.0}])
def test_a_head_that_is_kept_is_not_changed(setting: dict) -> None:
    kept = change(Recipe(), "model", weights=Path("w"), head="keep")
    (name,) = setting
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is of a new head, and --head keep takes the one"):
        check(with_settings(kept, setting, "test"))
    check(with_settings(kept, {"pool": "planned", "representation": 0, "head_bias": 0.0}, "test"))


def test_weights_bring_their_own_model() -> None:
    weights = change(Recipe(), "model", weights=Path("w"))
    check(with_settings(weights, {"model": "", "positions": "planned", "pool": "mean"}, "test"))
    for name, value in (("model", "ViT-B/16"), ("positions", "learned")):
        with pytest.raises(UserError, match=f"--{name} {value} is for random weights, and --weights w has"):
            check(with_settings(weights, {name: value}, "test"))
    # Of a recipe that names them for its own weights, the record says what is so.
    named = change(weights, "model", model="ViT-B/16", positions="learned")
    check(named)
    planned, said = plan(named, LARGE, GPU, (384, Preprocess(size=(224, 224))))
    assert (planned.model.model, planned.model.positions) == (OF_WEIGHTS, "planned")
    assert f"model {OF_WEIGHTS}, not the recipe's ViT-B/16" in said
    again, said = plan(planned, LARGE, GPU, (384, Preprocess(size=(224, 224))))
    assert again == planned
    assert not said


def test_settings_that_cannot_be_written_down() -> None:
    for name in ("data", "out", "weights"):
        with pytest.raises(UserError, match=rf"--{name} caf\\xe9 is not UTF-8"):
            check(with_settings(Recipe(), {name: os.fsdecode(b"caf\xe9")}, "test"))


def test_settings_by_name() -> None:
    recipe = with_settings(Recipe(), {"betas": (0.8, 0.9), "rate": 1}, "test")
    assert recipe.optimiser == Optimiser(betas=(0.8, 0.9), rate=1.0)
    assert recipe.given == {"betas", "rate"}
    assert with_settings(recipe, {"seed": 0}, "test").given == {"betas", "rate", "seed"}
    with pytest.raises(UserError, match=r"test has no setting named 'rte'; the nearest is 'rate'\."):
        with_settings(Recipe(), {"rte": 1}, "test")
    with pytest.raises(UserError, match="test: "):
        with_settings(Recipe(), {"rate": "fast"}, "test")


def test_sizes_of_pictures_pass_over_the_unreadable() -> None:
    class Mixed:
        classes, labels, fingerprint = ("a",), np.zeros(3, np.int64), "0"
        pictures = (b"no picture", np.zeros((5, 7, 13), np.uint8), np.zeros((6, 8), np.uint8))

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Sample:
            return Sample(str(index), self.pictures[index], 0)

    assert picture_sizes(Mixed(), 32) == [(5, 7), (6, 8)]
