"""A run that is killed goes on as if it had not been: the weights are the same to the bit, whatever moment it died at."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pictures import folder
from processes import Child, Nursery

from vitrail.cli import main
from vitrail.core.runs import RunFolder
from vitrail.experiments.place import open_folder
from vitrail.experiments.recipe import Recipe, with_settings
from vitrail.weights.load import load

COMMAND = shlex.split(
    "train --data data --model ViT-Nano/4 --size 16 --steps 24 --batch 8 --workers 2 --crop inception --precision bf16 "
    "--flip --shift 2 --mixup 0.2 --dropout 0.1 --drop-path 0.1 --polyak 0.9 --evaluate-every 0.5 --log-every 1"
)
ALWAYS = ("--save-minutes", "0")
"""Saves after each step."""

# Python for a child, run before the command.
PLAIN = """
# Figures and the report take longer than the training, and say nothing of it.
import vitrail.experiments.results as results
results.curves = results.write_report = lambda *_, **__: None
"""
SLOW = """
# Else a busy machine might train to the end before the signal is sent.
import time
from vitrail.training.log import Metrics
quick = Metrics.__call__
def slow(self, line):
    quick(self, line)
    time.sleep(0.1)
Metrics.__call__ = slow
"""
# At some moment it tells that it is there, and waits to be killed.
HALT = """
import io, pathlib, time
def halt():
    pathlib.Path({moment!r}).touch()
    time.sleep(600)
"""
IN_A_SAVE = """
import torch
whole, calls = torch.save, []
def half(data, file):
    calls.append(1)
    if len(calls) < 3:
        return whole(data, file)
    memory = io.BytesIO()
    whole(data, memory)
    file.write(memory.getvalue()[: memory.tell() // 2])
    file.flush()
    halt()
torch.save = half
"""
IN_A_MODEL = """
from vitrail.weights import writing
def half(tensors, path, metadata):
    pathlib.Path(path).write_bytes(b"half of a model")
    halt()
writing.save_file = half
"""
AFTER_A_MODEL = """
from vitrail.weights import native
whole = native.save
def then_halt(model, path):
    whole(model, path)
    halt()
native.save = then_halt
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("resume")
    folder(place / "data")
    return place


@pytest.fixture(scope="module")
def processes(place: Path) -> Nursery:
    return Nursery(place)


@pytest.fixture(scope="module")
def whole(place: Path, processes: Nursery) -> Path:
    """A run that was never interrupted."""
    code, _, error = processes.run(*COMMAND, *ALWAYS, "--out", "whole")
    assert code == 0, error
    return place / "whole"


@pytest.fixture
def run(place: Path, processes: Nursery) -> Path:
    return place / f"run{processes.count}"


def lines(run: Path) -> list[dict]:
    text = (run / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def halted(processes: Nursery, run: Path, code: str, *arguments: str) -> None:
    """Runs until the moment that `code` chooses, and kills it there."""
    moment = run.with_name(f"{run.name}-{processes.count}")
    child = processes.start(
        *COMMAND, "--out", run.name, *arguments, first=PLAIN + HALT.format(moment=str(moment)) + code
    )
    child.until(moment.exists).signal(signal.SIGKILL)
    assert child.code() == -signal.SIGKILL


def at_step(run: Path, step: int) -> Callable[[], bool]:
    metrics = run / "metrics.jsonl"
    return lambda: metrics.exists() and f'"step": {step},' in metrics.read_text()


def start(processes: Nursery, run: Path, *arguments: str, first: str = "") -> Child:
    return processes.start(*COMMAND, "--out", run.name, *arguments, first=PLAIN + first)


def same(run: Path, whole: Path) -> None:
    """Weights, state and all that was measured, to the bit."""
    for name in ("model.safetensors", "last.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    found, expected = (torch.load(path / "state.pt", weights_only=True) for path in (run, whole))
    found.pop("seconds"), expected.pop("seconds")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    timed = ("seconds", "images_per_second", "input_bound_percent")
    measured = [[{k: v for k, v in line.items() if k not in timed} for line in lines(path)] for path in (run, whole)]
    assert measured[0] == measured[1]
    rows = [json.loads((path / "results.json").read_text())["rows"] for path in (run, whole)]
    assert rows[0] == rows[1]


def finish(processes: Nursery, run: Path, whole: Path) -> None:
    child = start(processes, run, "--resume")
    assert child.code() == 0, child.err.read_text()
    assert "Traceback" not in child.err.read_text()
    same(run, whole)


def test_killed_before_anything_was_saved(run: Path, whole: Path, processes: Nursery) -> None:
    # In the middle of the first best model, then right after it: each time before the first state.
    halted(processes, run, IN_A_MODEL)
    assert not (run / "state.pt").exists()
    assert not (run / "model.safetensors").exists()
    halted(processes, run, AFTER_A_MODEL, "--resume")
    assert not (run / "state.pt").exists()
    assert lines(run)
    finish(processes, run, whole)


def test_killed_again_and_again(run: Path, whole: Path, processes: Nursery) -> None:
    child = start(processes, run, *ALWAYS, first=SLOW)
    for step in (5, 11, 17):
        child.until(at_step(run, step)).signal(signal.SIGKILL)
        assert child.code() == -signal.SIGKILL
        # At once: the data workers of the killed run are still there.
        child = start(processes, run, "--resume", *ALWAYS, first=SLOW)
    assert child.code() == 0, child.err.read_text()
    same(run, whole)


def test_killed_in_the_middle_of_a_save(run: Path, whole: Path, processes: Nursery) -> None:
    halted(processes, run, IN_A_SAVE, *ALWAYS)
    assert (run / "state.pt.part").stat().st_size > 1000
    good = RunFolder(run)
    assert good.load_state()["step"] == 2
    good.close()
    finish(processes, run, whole)
    assert not (run / "state.pt.part").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop(number: int, code: int, run: Path, whole: Path, processes: Nursery) -> None:
    child = start(processes, run, first=SLOW).until(at_step(run, 9))
    # A terminal's Ctrl-C goes to the data workers too.
    assert child.signal(number, group=True).code() == code
    assert "--resume" in child.out.read_text()
    assert "Traceback" not in child.err.read_text()
    assert 9 <= torch.load(run / "state.pt", weights_only=True)["step"] < 24
    assert (run / "last.safetensors").exists()
    finish(processes, run, whole)


def test_finished_runs_can_be_resumed(whole: Path, processes: Nursery) -> None:
    before = (whole / "model.safetensors").read_bytes()
    measured = lines(whole)
    code, said, _ = processes.run(*COMMAND, "--out", "whole", "--resume")
    assert code == 0
    assert "validation top-1" in said
    assert (whole / "model.safetensors").read_bytes() == before
    assert lines(whole) == measured


def test_a_second_run_on_the_folder_is_refused(run: Path, processes: Nursery) -> None:
    child = start(processes, run, first=SLOW).until(at_step(run, 2)).signal(signal.SIGSTOP)
    for more in ((), ("--resume",)):
        code, _, error = processes.run(*COMMAND, "--out", run.name, *more)
        assert code == 2
        assert error.strip() == f"--out {run.name} is in use by another run; wait for it to end or give another folder."
    child.signal(signal.SIGKILL).signal(signal.SIGCONT)
    assert child.code() == -signal.SIGKILL


# What follows needs no process of its own.


@pytest.fixture
def copy(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run beside its data, to be spoilt."""
    shutil.copytree(whole.parent / "data", tmp_path / "data")
    shutil.copytree(whole, tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "whole"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence of a command that ends with exit code 2."""
    assert main([*COMMAND, "--out", "whole", "--resume", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith(".\n")
    return error


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--model", "ViT-Nano/8"), ("--data", "other"), ("--batch", "6"), ("--steps", "25"), ("--seed", "1")],
)
def test_other_settings_are_refused(flag: str, value: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    error = refused(capsys, flag, value)
    assert error.startswith(f"--resume: this run began with {flag} ")
    assert value in error
    assert before == {path.name: path.read_bytes() for path in copy.iterdir()}


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--mixup", "0", "--mixup 0.2"),
        ("--crop", "planned", "--crop"),
        ("--config", "a.toml", "--dropout 0.1, not 0.0"),
    ],
)
def test_so_is_the_default_where_it_is_asked_for(
    flag: str, value: str, said: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy.parent / "a.toml").write_text("dropout = 0.0\n")
    assert main(["train", "--data", "data", "--out", "whole", "--resume", flag, value]) == 2
    assert capsys.readouterr().err.startswith(f"--resume: this run began with {said}")


def test_other_pictures_are_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = next((copy.parent / "data" / "class1").iterdir())
    kept.write_bytes(kept.read_bytes() + b" ")
    assert "split.json is the split of other data" in refused(capsys)
    (copy / "split.json").unlink()
    assert "--resume: data has changed since this run began" in refused(capsys)


def test_free_settings_may_change(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (copy / "model.safetensors").read_bytes()
    assert main([*COMMAND, "--out", "whole", "--resume", "--workers", "0", "--save-minutes", "9"]) == 0
    assert (copy / "model.safetensors").read_bytes() == before


def test_free_settings_may_go_back_to_the_default(copy: Path) -> None:
    recipe = with_settings(Recipe(), {"out": copy, "resume": True, "log_every": 50}, "test")
    for asked, expected in ((recipe, 50), (dataclasses.replace(recipe, given=frozenset()), 1)):
        held, continued = open_folder(asked)
        assert held is not None
        held.close()
        assert continued.run.log_every == expected


def test_spoilt_states_are_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, state = copy / "state.pt", torch.load(copy / "state.pt", weights_only=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "state.pt cannot be read" in refused(capsys)
    path.write_bytes(b"")
    assert "state.pt cannot be read" in refused(capsys)
    torch.save({**state, "format": 2}, path)
    assert "was written in format 2, newer than this version's 1; update vitrail" in refused(capsys)
    torch.save({"weights": torch.zeros(2)}, path)
    assert "is not a Vitrail training state" in refused(capsys)
    torch.save({**state, "model": {}}, path)
    assert "--resume: the checkpoint holds another model" in refused(capsys)
    torch.save({**state, "total": 7}, path)
    assert "of a run of 7 steps" in refused(capsys)


def test_spoilt_folders_are_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, config = copy / "config.json", json.loads((copy / "config.json").read_text())
    path.write_text(path.read_text()[:100])
    assert "config.json is damaged" in refused(capsys)
    path.write_text(json.dumps({"hidden_size": 768}))
    assert "is not a Vitrail run's" in refused(capsys)
    path.write_text(json.dumps({**config, "format": 2}))
    assert "has format 2, newer than this version's 1; update vitrail" in refused(capsys)
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "settings"}))
    assert "config.json is damaged" in refused(capsys)
    path.unlink()
    assert "--resume: whole holds no run to go on with" in refused(capsys)
    shutil.rmtree(copy)
    assert "--resume: whole holds no run to go on with" in refused(capsys)
    assert not copy.exists()
    copy.write_text("a file")
    assert "--resume: whole holds no run to go on with" in refused(capsys)


def test_a_torn_line_of_metrics_is_dropped(copy: Path) -> None:
    measured = lines(copy)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 24, "epo')
    assert main([*COMMAND, "--out", "whole", "--resume"]) == 0
    assert lines(copy) == measured


def test_a_model_that_cannot_be_written(run: Path, whole: Path, processes: Nursery) -> None:
    child = start(
        processes, run, first="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    )
    assert child.code() == 2
    error = child.err.read_text()
    assert "model.safetensors could not be written" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not list(run.glob("*.safetensors*")) + list(run.glob(".*.partial"))
    finish(processes, run, whole)


def test_a_full_disk_keeps_what_is_there(run: Path, whole: Path, processes: Nursery) -> None:
    child = start(processes, run, first=SLOW).until(at_step(run, 9)).signal(signal.SIGINT)
    assert child.code() == 130
    # The best weights may be newer: an evaluation that comes before the save may have found better ones.
    kept = {name: (run / name).read_bytes() for name in ("state.pt", "last.safetensors") if (run / name).exists()}
    # What is written to the side of the state goes to a device that is always full.
    full = f"import os; os.symlink('/dev/full', {str(run / 'state.pt.part')!r})"
    child = start(processes, run, "--resume", first=full)
    assert child.code() == 2
    error = child.err.read_text()
    said = error.splitlines()[-1]
    assert said.endswith(
        "state.pt could not be written: no space is left on the disk; its last good version is kept; free some space and "
        "continue."
    )
    assert "Traceback" not in error
    assert kept == {name: (run / name).read_bytes() for name in kept}
    assert load(run).config.classes > 1
    assert not os.path.lexists(run / "state.pt.part")
    finish(processes, run, whole)
