"""A deadline: the loop ends as if its steps were done, on all processes at once, and `fit` keeps to its minutes."""

import json
import math
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import folder
from processes import Nursery
from test_loop import Pictures, small, train
from test_ranks import COMMAND, SLOW
from test_resume import PLAIN

from vitrail.cli import main
from vitrail.core.errors import UserError
from vitrail.core.runs import RunFolder, read_json, write_json
from vitrail.core.types import Row
from vitrail.experiments import photos
from vitrail.experiments.first_answer import Judged
from vitrail.experiments.photos import Settings, fit_photos
from vitrail.experiments.photos_data import read_photos
from vitrail.experiments.photos_folder import State
from vitrail.models.classifier import ClassifierConfig
from vitrail.models.vit import ViTConfig
from vitrail.training import loop
from vitrail.training.log import Metrics
from vitrail.training.pace import Pace, ending_by
from vitrail.weights.native import save

OVER = {"deadline": 0.0}
"""A moment that has passed on every machine."""


@pytest.mark.parametrize("every", [1, 3])
def test_the_loop_ends_as_after_its_last_step(every: int, tmp_path: Path) -> None:
    run, saved, evaluated = RunFolder(tmp_path), [], []

    def look(model: torch.nn.Module) -> list[Row]:
        evaluated.append(model)
        return [Row("validation/accuracy", 5.0)]

    outcome = train(
        small(),
        evaluate=look,
        pace={"evaluate_every": every, **OVER},
        folder=run,
        save_model=lambda model, path: saved.append(path.name),
        logs=[Metrics(tmp_path / "metrics.jsonl")],
    )
    assert (outcome.step, outcome.total, outcome.late, outcome.interrupted) == (1, 6, True, None)
    assert (outcome.best, outcome.best_step) == (5.0, 1)
    assert len(evaluated) == 1  # the step's own evaluation, where it has one, is not done again
    assert saved == ["model.safetensors", "last.safetensors"]
    assert run.load_state()["step"] == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [set(line) & {"loss", "validation/accuracy"} for line in lines] == [{"loss"}, {"validation/accuracy"}]
    run.close()


def test_what_a_deadline_ended_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, rest, run = small(0.1), small(0.1), RunFolder(tmp_path)
    train(whole)
    train(small(0.1), folder=run, pace=OVER)
    outcome = train(rest, state=run.load_state())
    assert (outcome.step, outcome.late) == (6, False)
    torch.testing.assert_close(rest.state_dict(), whole.state_dict(), rtol=0, atol=0)
    run.close()


def test_a_run_that_measures_steps_is_not_cut_short() -> None:
    assert train(small(), pace=OVER).step == 6


def test_a_run_whose_steps_are_done_is_not_late(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert not train(small(), Pictures(steps=1), pace=OVER, folder=run).late
    run.close()


def test_a_deadline_comes_from_around_a_run() -> None:
    with ending_by(5.0):
        assert Pace().deadline == 5.0
        assert Pace(deadline=7.0).deadline == 7.0
        with ending_by(3.0):
            assert Pace().deadline == 3.0
        assert Pace().deadline == 5.0
    assert Pace().deadline == math.inf


def test_two_processes_end_after_the_same_step(tmp_path: Path) -> None:
    folder(tmp_path / "data")
    late = "from vitrail.training import pace\npace._deadline.set(time.monotonic() + 1.5)\n"
    processes = Nursery(tmp_path)
    # The second knows of no deadline.
    pair = processes.together(*COMMAND, "--steps", 60, "--out", "run", first=(PLAIN + SLOW + late, PLAIN + SLOW))
    assert [child.code() for child in pair] == [0, 0], pair[0].err.read_text()
    step = torch.load(tmp_path / "run/state.pt", weights_only=True)["step"]
    assert 0 < step < 60
    assert "step 60" not in pair[0].err.read_text()
    assert "validation top-1" in pair[0].out.read_text()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("tiny")
    save(ViTConfig(16, 1, 2, 32, (5, 5), (20, 20)).build(seed=0), place)
    return str(place)


MINUTES = 0.3
GIVEN: dict[str, Any] = {"minutes": MINUTES, "validation": 0.3, "seed": 3}


@pytest.fixture(scope="module")
def slowed(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, float, str]]:
    """A fit whose machine became slower in the middle: where it lies, the seconds it took, what it said."""
    root = tmp_path_factory.mktemp("slowed")
    folder(root / "my photos", each=30)
    quick = loop._Run._update

    def slower(self: Any, batch: Any) -> torch.Tensor:
        if self.folder is not None and self.step >= 3:  # not while a step is measured
            time.sleep(1.0)
        return quick(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITRAIL_CACHE", str(root / "cache"))
        patch.chdir(root)
        patch.setattr(photos, "LEAST", 0.1)
        patch.setattr(photos, "REST", 6.0)
        patch.setattr(loop._Run, "_update", slower)
        said: list[str] = []
        patch.setattr(photos, "say", said.append)
        begun = time.monotonic()
        assert fit_photos(Settings("my photos", weights=tiny, out=Path("v 3"), **GIVEN)) == 0
        seconds = time.monotonic() - begun
        patch.setattr(loop._Run, "_update", quick)
        yield root / "v 3", seconds, "\n".join(said)


def test_fit_keeps_to_its_minutes_on_a_machine_that_slows(slowed: tuple[Path, float, str]) -> None:
    run, seconds, said = slowed
    found = read_json(run / "results.json")["training"]
    assert found["ended_by_deadline"]
    assert 3 < found["steps"] < found["planned_steps"]
    assert found["planned_steps"] - 3 > 60 * MINUTES + 16  # seconds that the steps alone would have taken
    assert seconds < 60 * MINUTES + 8
    assert read_json(run / "results.json")["comparison"]["count"] == 27
    sentence = f"the minutes were over after {found['steps']} of {found['planned_steps']} planned steps"
    assert sentence in said
    assert f"T{sentence[1:]}" in (run / "report.html").read_text()


def test_the_printed_commands_can_be_typed(slowed: tuple[Path, float, str]) -> None:
    run, _, said = slowed
    shutil.copytree(run, run.with_name("copy of v 3"))
    lines = [line.strip() for line in said.splitlines() if line.strip().startswith("vitrail ")]
    assert "vitrail evaluate 'v 3' --data 'my photos'" in lines
    resume = shlex.split(next(line for line in lines if "--resume" in line).replace("v 3", "copy of v 3"))
    assert main([*resume[1:], "--minutes", "1"]) == 0
    after = read_json(run.with_name("copy of v 3") / "config.json")["settings"]
    assert {name: after[name] for name in GIVEN} == {**GIVEN, "minutes": 1.0}
    assert after["weights"] == read_json(run / "config.json")["settings"]["weights"]
    found = read_json(run.with_name("copy of v 3") / "results.json")["training"]
    assert found["steps"] == found["planned_steps"]
    assert not found["ended_by_deadline"]


@pytest.mark.parametrize(
    ("now", "given", "sentence"),
    [
        ({"validation": 0.4}, (), "began with --validation 0.3, not --validation 0.4"),
        ({}, ("validation",), "began with --validation 0.3, not --validation 0.2"),
        ({"seed": 1}, (), "began with --seed 3, not --seed 1"),
        ({"weights": "vitrail:ViT-Micro/7"}, (), "not --weights vitrail:ViT-Micro/7"),
    ],
)
def test_a_run_goes_on_as_it_began(now: dict, given: tuple, sentence: str, slowed: tuple[Path, float, str]) -> None:
    before = (slowed[0] / "config.json").read_bytes()
    with pytest.raises(UserError, match=re.escape(sentence)):
        fit_photos(Settings("my photos", out=slowed[0], resume=True, **now), (), given)
    assert (slowed[0] / "config.json").read_bytes() == before


def test_what_was_not_given_is_as_it_was(slowed: tuple[Path, float, str], tiny: str) -> None:
    path, asked = slowed[0] / "config.json", Settings("my photos", resume=True)
    found, _ = photos._recalled(asked, (), path)
    assert found == Settings("my photos", weights=tiny, resume=True, **GIVEN)
    more = replace(asked, minutes=20.0, weights=str(Path(tiny) / "../tiny0" / ".." / Path(tiny).name))
    assert photos._recalled(more, (), path)[0].minutes == 20.0  # minutes may change, and a path be written otherwise
    assert photos._recalled(asked, ("minutes",), path)[0].minutes == 10.0


def test_a_run_from_random_weights_goes_on_with_them(slowed: tuple[Path, float, str], tmp_path: Path) -> None:
    config = read_json(slowed[0] / "config.json")
    config["settings"]["weights"] = ""
    write_json(tmp_path / "config.json", config)
    with pytest.raises(UserError, match="began with random weights, not --weights other"):
        photos._recalled(Settings("my photos", weights="other", resume=True), (), tmp_path / "config.json")
    asked, known = photos._recalled(Settings("my photos", resume=True), (), tmp_path / "config.json")
    run = RunFolder(tmp_path)
    assert photos._Fit(asked, "", torch.device("cpu"), run, known)._weights() is None
    run.close()


def test_only_a_fit_is_gone_on_with(tmp_path: Path) -> None:
    for config in ({"settings": {"seed": 0}, "data": {}}, [], {"hidden_size": 768}):
        write_json(tmp_path / "config.json", config)
        with pytest.raises(UserError, match="is not of a run of `vitrail fit`"):
            fit_photos(Settings("my photos", out=tmp_path, resume=True))


def test_kept_weights_are_judged_once_and_others_anew(
    slowed: tuple[Path, float, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a run that went on, the best weights may be older than those that were looked at last."""
    asked: list[Any] = []

    def judged(name: str) -> Judged:
        asked.append(name)
        return Judged(name, source, np.arange(len(source)), np.full((len(source), 3), 1 / 3))

    photos_there = read_photos(str(slowed[0].with_name("my photos")), 0.3, 3, None, lambda line: None)
    source, run = photos_there.train, RunFolder(slowed[0])
    fit = photos._Fit(Settings("p"), "", torch.device("cpu"), run, {})
    monkeypatch.setattr(fit, "_judge", lambda state, model, pictures: judged(pictures))
    state = State(photos_there, {}, "")
    one, other = (ClassifierConfig(ViTConfig(16, 1, 2, 32, (5, 5), (20, 20)), 3).build(seed=seed) for seed in (0, 1))
    assert fit._choosing(state, one) is fit._choosing(state, one)
    assert asked == ["held out"]
    assert fit._choosing(state, other) is not fit._choosing(state, one)
    assert len(asked) == 3
    run.close()
