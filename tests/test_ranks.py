"""Two processes train as one does: the same losses, each picture once, and neither waits for another that has gone."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pictures import folder
from processes import SECONDS, Nursery

from vitrail.core import ranks
from vitrail.core.errors import UserError

COMMAND = shlex.split(
    "train --data data --model ViT-Nano/4 --size 16 --steps 20 --batch 16 --workers 0 --precision fp32 --crop none "
    "--no-flip --log-every 1 --warmup 2"
)
SLOW = """
import time
from vitrail.training import loop
whole = loop._Run._update
def slow(self, batch):
    time.sleep(0.1)
    return whole(self, batch)
loop._Run._update = slow
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """55 pictures, of which 49 train: a number that neither 16 nor 2 divides."""
    place = tmp_path_factory.mktemp("ranks")
    folder(place / "data", each=19)
    for label in (1, 2):
        (place / "data" / f"class{label}" / "0.png").unlink()
    return place


@pytest.fixture(scope="module")
def processes(place: Path) -> Nursery:
    return Nursery(place)


def measured(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def counts(run: Path) -> list[int]:
    return [row["count"] for row in json.loads((run / "results.json").read_text())["rows"]]


@pytest.fixture(scope="module")
def alone(place: Path, processes: Nursery) -> Path:
    code, _, error = processes.run(*COMMAND, "--out", "alone")
    assert code == 0, error
    return place / "alone"


def test_torchrun_gives_the_losses_of_one_process(alone: Path, place: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "vitrail"]
    done = subprocess.run(
        [*torchrun, *COMMAND, "--out", "torchrun"],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, expected = measured(place / "torchrun"), measured(alone)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert len([line for line in found if "loss" in line]) == 20
    for line, other in zip(found, expected, strict=True):
        for name in ("loss", "rate", "validation/loss", "validation/accuracy"):
            assert line.get(name) == pytest.approx(other.get(name), abs=1e-5), (line["step"], name)
    assert counts(place / "torchrun") == counts(alone)
    # What is said is said once.
    assert done.stdout.count("run folder:") == 1
    assert done.stderr.count("step 20/20") == 1


def test_ctrl_c_saves_and_the_run_goes_on(alone: Path, place: Path, processes: Nursery) -> None:
    run = place / "stopped"
    pair = processes.together(*COMMAND, "--out", run.name, first=(SLOW, SLOW))
    pair[0].until(lambda: (run / "metrics.jsonl").exists() and len(measured(run)) > 3)
    for child in reversed(pair):
        child.signal(signal.SIGINT)
    assert [child.code() for child in pair] == [130, 130]
    assert 0 < torch.load(run / "state.pt", weights_only=True)["step"] < 20
    pair = processes.together(*COMMAND, "--out", run.name, "--resume")
    assert [child.code() for child in pair] == [0, 0], pair[0].err.read_text()
    for line, other in zip(measured(run), measured(alone), strict=True):
        for name in ("step", "loss", "validation/loss"):
            assert line.get(name) == pytest.approx(other.get(name), abs=1e-5), (line["step"], name)


def test_saving_by_the_clock_keeps_the_processes_in_step(place: Path, processes: Nursery) -> None:
    # One is slower, so that their clocks disagree on when to save.
    flags = ("--save-minutes", 0.002, "--steps", 10, "--out", "clock")
    pair = processes.together(*COMMAND, *flags, first=("", SLOW))
    assert [child.code() for child in pair] == [0, 0], pair[0].err.read_text()
    assert torch.load(place / "clock" / "state.pt", weights_only=True)["step"] == 10


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--data nowhere", "nowhere does not exist"),
        ("--batch 7", "--batch 7 cannot be shared by 2 processes"),
        ("--resume --out nowhere", "--resume: nowhere holds no run"),
    ],
)
def test_a_refusal_reaches_both(flags: str, said: str, processes: Nursery) -> None:
    for child in processes.together(*COMMAND, *flags.split()):
        assert child.code() == 2
        assert said in child.err.read_text()
        assert "Traceback" not in child.err.read_text()


def test_a_full_disk_on_the_first_ends_both(place: Path, processes: Nursery) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    first, second = processes.together(*COMMAND, "--save-minutes", 0, "--out", "full", first=(full, ""))
    assert (first.code(), second.code()) == (2, 2)
    assert "could not be written" in first.err.read_text()
    assert "Process 1 ends because another one has" in second.err.read_text()
    assert "Traceback" not in first.err.read_text() + second.err.read_text()


def test_a_process_that_is_killed_ends_the_other(processes: Nursery) -> None:
    die = "import os, signal\nfrom vitrail.training import loop\n"
    die += "loop._Run._save = loop._Run._evaluate = lambda self: os.kill(os.getpid(), signal.SIGKILL)"
    first, second = processes.together(*COMMAND, "--out", "killed", first=("", die))
    assert (first.code(), second.code()) == (2, -signal.SIGKILL)
    assert "Process 0 ends because another one has" in first.err.read_text()
    assert "Traceback" not in first.err.read_text()


def test_a_loss_that_is_not_finite_on_one_ends_both(place: Path, processes: Nursery) -> None:
    spoil = "from vitrail.objectives.supervised import Supervised\nwhole = Supervised.__call__\nimport dataclasses\n"
    spoil += "Supervised.__call__ = lambda self, batch, seed: dataclasses.replace(\n"
    spoil += "    whole(self, batch, seed), total=whole(self, batch, seed).total * float('nan'))"
    pair = processes.together(*COMMAND, "--out", "spoilt", first=("", spoil))
    assert [child.code() for child in pair] == [2, 2]
    assert "The loss was not finite at step 0 of 20; its batch is in spoilt/divergence.pt" in pair[0].err.read_text()
    record = torch.load(place / "spoilt" / "divergence.pt", weights_only=True)
    assert record["index"].shape == (16,)
    assert len(set(record["index"].tolist())) == 16


def test_one_process_is_the_identity() -> None:
    tensor, item = torch.arange(3), object()
    assert ranks.reduce_sum(tensor) is tensor
    assert ranks.reduce_max(tensor) is tensor
    assert ranks.gather_objects(item) == [item]
    assert ranks.from_first(item) is item
    assert ranks.by_first(lambda: item) is item
    assert (ranks.rank(), ranks.count(), ranks.first()) == (0, 1, True)

    def refuse() -> None:
        raise UserError("no.")

    with pytest.raises(UserError, match=r"^no\.$"):
        ranks.by_first(refuse)
