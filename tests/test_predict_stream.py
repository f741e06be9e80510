"""`vitrail predict --out`: the answers of the plain forms, in a file that outlives whatever ends the process."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from processes import Nursery

from vitrail.commands.predict import Files, Pictures, Settings, find, run
from vitrail.commands.reading import Checkpoint
from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess, Sample
from vitrail.inference.answers import Answer, kind_of
from vitrail.inference.engines import Engine, engine
from vitrail.inference.stream import decoders, stream
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights.native import save

LABELS = ('"red", [b]', "gre\nen", "blue", "grey")
SUFFIXES = ("jsonl", "csv", "parquet")
COUNT = 23
MADE = {"model": "m", "top": 2}


def small(seed: int = 3) -> Classifier:
    model = ClassifierConfig(ViTConfig(16, 1, 2, 32, (8, 8), (16, 16)), len(LABELS)).build(seed=seed)
    with torch.no_grad():
        model.head.output.weight.normal_(0, 1, generator=torch.Generator().manual_seed(seed))
    model.labels, model.preprocess = LABELS, Preprocess((16, 16))
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(small(), folder)
    return folder


def draw(folder: Path) -> Path:
    """Pictures 0 to 22; picture 5 is none."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(COUNT):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "5.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data") / 'pic"tures, many')


@pytest.fixture
def processes(tmp_path: Path) -> Nursery:
    return Nursery(tmp_path)


def stop_at(picture: Path) -> Callable[[], bool]:
    """Makes a pipe of a picture, into which nobody writes: whoever reads it waits. Says whether somebody does."""
    picture.unlink()
    os.mkfifo(picture)

    def waits() -> bool:
        try:
            os.open(picture, os.O_WRONLY | os.O_NONBLOCK)  # left open: the reader then waits for what is written
        except OSError:
            return False
        return True

    return waits


def read(path: Path) -> list[dict]:
    """Any form, as the objects of JSON that the answers are."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".parquet":
        return [
            {"picture": row["picture"], "reason": row["reason"]}
            if row["reason"]
            else {
                "picture": row["picture"],
                "predictions": [
                    {"class": name, "probability": p}
                    for name, p in zip(row["classes"], row["probabilities"], strict=True)
                ],
            }
            for row in pq.read_table(path).to_pylist()
        ]
    found: dict[str, dict] = {}
    for row in csv.DictReader(io.StringIO(path.read_text(), newline="")):
        if row["reason"]:
            found[row["picture"]] = {"picture": row["picture"], "reason": row["reason"]}
            continue
        entry = found.setdefault(row["picture"], {"picture": row["picture"], "predictions": []})
        entry["predictions"].append({"class": row["class"], "probability": float(row["probability"])})
        assert int(row["rank"]) == len(entry["predictions"])
    return list(found.values())


@pytest.mark.parametrize(("suffix", "batch", "workers"), [("jsonl", 4, 0), ("csv", 64, -1), ("parquet", 1, 2)])
def test_a_file_has_the_answers_of_the_plain_forms(
    weights: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
    batch: int,
    workers: int,
) -> None:
    names = (str(pictures), "nowhere.png")
    assert run(Settings(weights, names, top=3, json=True, batch=batch, workers=0)) == 2
    plain = json.loads(capsys.readouterr().out)
    out = tmp_path / f"answers.{suffix}"
    assert run(Settings(weights, names, top=3, out=out, batch=batch, workers=workers)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1] == "2 of 24 could not be read."
    assert sum("5.png" in line for line in said.err.splitlines()) == 1
    found = read(out)
    assert len(found) == 24
    assert [entry["picture"] for entry in found] == [entry["picture"] for entry in plain]
    assert [Path(entry["picture"]).stem for entry in found[:COUNT]] == [str(number) for number in range(COUNT)]
    assert ["reason" in entry for entry in found] == [number in (5, 23) for number in range(24)]
    for one, other in zip(found, plain, strict=True):
        assert one.get("reason") == other.get("reason")
        for mine, theirs in zip(one.get("predictions", ()), other.get("predictions", ()), strict=True):
            assert mine["class"] == theirs["class"]
            assert mine["probability"] == pytest.approx(theirs["probability"], abs=5e-7 if suffix == "csv" else 0)
    assert {file.name for file in tmp_path.iterdir()} == {out.name, f"{out.name}.settings.json"}
    # The same command again changes nothing, and says the same of the pictures.
    before = out.read_bytes()
    assert run(Settings(weights, names, top=3, out=out, batch=batch, workers=workers)) == 2
    assert "has all 24 answers already." in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize(("suffix", "workers"), [("jsonl", 2), ("csv", 0), ("parquet", 0)])
def test_a_killed_run_goes_on_to_the_same_file(weights: Path, processes: Nursery, suffix: str, workers: int) -> None:
    here = processes.folder
    draw(here / "pictures")
    flags = ["--batch", 4, "--workers", workers, "--top", 2]
    assert processes.run("predict", weights, "pictures", *flags, "--out", f"whole.{suffix}")[0] == 2
    last = (here / "pictures/13.png").read_bytes()
    waits = stop_at(here / "pictures/13.png")
    named = [f"pictures/{number}.png" for number in range(COUNT)]
    out = here / f"broken.{suffix}"
    child = processes.start(
        *("predict", weights, *named, *flags, "--out", out.name),
        first="from vitrail.inference import answers_parquet; answers_parquet.PART_ROWS = 4",
    )
    parts = here / "broken.parquet.parts"
    there: dict[str, Callable[[], bool]] = {
        "jsonl": lambda: out.exists() and out.read_bytes().count(b"\n") >= 12,
        "csv": lambda: out.exists() and out.read_bytes().count(b"11.png") == 2,
        "parquet": lambda: (parts / f"{8:012d}.parquet").exists(),
    }
    child.until(waits).until(there[suffix])
    code, _, error = processes.run("predict", weights, *named, *flags, "--out", out.name)
    assert code == 2
    assert "is being written by another process" in error
    assert child.signal(signal.SIGKILL).code() == -signal.SIGKILL
    if suffix != "parquet":
        assert len(read(out)) == 12
        os.truncate(out, out.stat().st_size - 9)
    (here / "pictures/13.png").unlink()
    (here / "pictures/13.png").write_bytes(last)
    code, _, error = processes.run("predict", weights, "pictures", *flags, "--out", out.name)
    assert code == 2
    assert ("was cut short" in error) == (suffix != "parquet")
    assert f"{12 if suffix == 'parquet' else 11} were there already" in error
    assert out.read_bytes() == (here / f"whole.{suffix}").read_bytes()
    assert not parts.exists()


def test_ctrl_c_keeps_what_is_there(weights: Path, processes: Nursery) -> None:
    here = processes.folder
    draw(here / "pictures")
    waits = stop_at(here / "pictures/13.png")
    named = [f"pictures/{number}.png" for number in range(COUNT)]
    child = processes.start("predict", weights, *named, "--batch", 4, "--workers", 0, "--out", "a.parquet").until(waits)
    # Nothing is on the disk yet; what is in memory must be written when the signal comes.
    assert not list((here / "a.parquet.parts").glob("*.parquet"))
    assert child.signal(signal.SIGINT).code() == 130
    assert "12 of 23 pictures are in a.parquet; the same command goes on from there." in child.err.read_text()
    (part,) = (here / "a.parquet.parts").glob("*.parquet")
    assert pq.read_table(part).num_rows == 12


def test_other_answers_are_refused(weights: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    given = Settings(weights, (str(pictures),), out=out, batch=8, workers=0)
    assert run(given) == 2
    save(small(seed=4), tmp_path / "other")
    changed = [
        (Settings(tmp_path / "other", given.pictures, out=out, batch=8), "another model"),
        (Settings(weights, given.pictures, out=out, batch=8, top=2), "begun with top 4, which is now 2"),
        (
            Settings(weights, given.pictures, out=out, batch=8, checkpoint=Checkpoint(precision="bf16")),
            'precision "fp32", which is now "bf16"',
        ),
        (Settings(weights, (str(pictures / "2.png"),), out=out, batch=8), "as picture 1, where the command line names"),
        (Settings(weights, given.pictures, out=tmp_path / "answers.txt"), "no known form"),
        (Settings(weights, given.pictures, out=out, json=True), "exclude each other"),
        (Settings(weights, given.pictures, out=tmp_path / "none" / "a.parquet"), "cannot be written"),
    ]
    before = out.read_bytes()
    for settings, sentence in changed:
        with pytest.raises(UserError, match=sentence):
            run(settings)
    assert out.read_bytes() == before
    (tmp_path / "mine.parquet").write_text("mine")
    with pytest.raises(UserError, match="holds something already"):
        run(Settings(weights, given.pictures, out=tmp_path / "mine.parquet", batch=8))
    assert (tmp_path / "mine.parquet").read_text() == "mine"
    assert not (tmp_path / "mine.parquet.parts").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_that_grew_at_its_end(weights: Path, pictures: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"answers.{suffix}"
    names = tuple(str(pictures / f"{number}.png") for number in range(COUNT))
    for end in (7, 7, 16):
        run(Settings(weights, names[:end], out=out, batch=4, workers=0))
        assert [Path(entry["picture"]).stem for entry in read(out)] == [str(number) for number in range(end)]


def test_a_stream_may_begin_anywhere_and_says_the_same_to_the_bit(pictures: Path) -> None:
    model = small()
    source = Pictures(Files((os.fsencode(pictures / f"{number}.png") for number in range(COUNT)), {}))

    def answers(batch: int, start: int, workers: int = 0) -> list[Answer]:
        found = stream(
            *(model, source, model.preprocess, LABELS), device="cpu", batch=batch, workers=workers, start=start
        )
        return [answer for some in found for answer in some]

    for batch in (1, 4, COUNT, 100):
        whole = answers(batch, 0)
        assert len(whole) == COUNT
        for start in (0, 3, 4, 22, 23):
            assert answers(batch, start) == whole[start:]
    assert answers(5, 7, workers=2) == answers(5, 0)[7:]


def test_a_batch_that_is_not_full_costs_no_more_than_its_pictures(pictures: Path) -> None:
    model, seen = small(), []

    def ask(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.shape[0])
        return model(images)

    source = Pictures(Files((os.fsencode(pictures / f"{number}.png") for number in range(COUNT)), {}))
    for _ in stream(model, source, model.preprocess, LABELS, device="cpu", batch=8, workers=0, of=ask):
        pass
    assert seen == [8, 8, 7]


HEAVY = ("datasets", "pyarrow", "matplotlib", "tensorboard", "openvino", "onnxruntime", "sklearn", "scipy", "pandas")


def test_one_picture_needs_nothing_heavy(weights: Path, pictures: Path) -> None:
    code = (
        "import os, sys; from vitrail.cli import main; code = main(sys.argv[2:]); "
        "print([name for name in sys.argv[1].split() if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, " ".join(HEAVY), "predict", str(weights), str(pictures / "0.png")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_process_is_started_for_a_single_batch() -> None:
    assert decoders(64, 64) == 0
    assert 1 <= decoders(65, 64) <= 2
    assert decoders(0, 1) == 0


def test_a_file_goes_on_in_the_precision_that_its_engine_had(
    weights: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto may take fp32 where bf16 was asked for, on a processor without it."""
    out, asked = tmp_path / "answers.jsonl", Checkpoint(engine="", precision="bf16")
    names = tuple(str(pictures / f"{number}.png") for number in (0, 1, 2, 3))

    def chosen(given: Checkpoint, model: Classifier, **named: object) -> Engine:
        return engine(model, "eager", "fp32", batch=2)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "asking", chosen)
        assert run(Settings(weights, names[:2], out=out, batch=2, workers=0, checkpoint=asked)) == 0
    assert run(Settings(weights, names, out=out, batch=2, workers=0, checkpoint=asked)) == 0
    assert len(read(out)) == 4
    with pytest.raises(UserError, match='begun with asked "bf16", which is now "fp32"'):
        run(Settings(weights, names, out=out, batch=2, workers=0, checkpoint=Checkpoint(engine="")))


def test_a_name_that_no_system_takes_costs_itself_alone(weights: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    assert run(Settings(weights, ("a" * 300 + ".jpg", str(pictures / "1.png")), out=out)) == 2
    good, bad = read(out)
    assert Path(good["picture"]).name == "1.png"
    assert "cannot be looked at (File name too long)" in bad["reason"]


def test_names_take_little_room(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number:05d}.png" for number in range(10_000)]
    for path in paths:
        path.touch()
    find([str(tmp_path)])  # what is imported at the first call is not counted
    tracemalloc.start()
    found, _ = find([str(tmp_path)])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10_000 * 400  # as paths, or with all that the system says of a file, it would be twice that
    tracemalloc.start()
    files = Files(map(os.fsencode, paths), {})
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 10_000 * (len(str(paths[0])) + 16)
    assert list(found) == list(files)
    assert [sample.name for sample in files[9_998:]] == [str(path) for path in paths[9_998:]]
    assert files[-1].picture == paths[-1]


def test_memory_does_not_grow_with_the_pictures(tmp_path: Path) -> None:
    model = small()
    peaks = []
    for count in (200, 1000):
        samples = [Sample(f"{number:04d}", np.zeros((16, 16, 3), np.uint8)) for number in range(count)]
        path = tmp_path / f"{count}.jsonl"
        with kind_of(path)(path, MADE, [sample.name for sample in samples]) as out:
            tracemalloc.start()
            source = Pictures(samples)
            for answers in stream(model, source, model.preprocess, LABELS, device="cpu", batch=8, workers=0, top=2):
                out.add(answers)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert len(read(path)) == count
    # 800 answers would take some 600 bytes each.
    assert peaks[1] < peaks[0] + 100_000


class Watched:
    """Pictures that leave a mark in a folder once they are opened."""

    classes, labels, fingerprint = (), np.zeros(0, np.int64), ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 1_000

    def __getitem__(self, index: int) -> Sample:
        (self.folder / str(index)).touch()
        return Sample(str(index), np.zeros((16, 16, 3), np.uint8))


def test_what_waits_is_bounded(tmp_path: Path) -> None:
    """However many pictures there are, no more are decoded than the queue has room for."""
    model = small()
    answers = stream(model, Watched(tmp_path), model.preprocess, LABELS, device="cpu", batch=4, workers=2)
    next(answers)
    opened = [0]
    while len(opened) < 30 or opened[-1] > opened[-20]:
        time.sleep(0.02)
        opened.append(len(list(tmp_path.iterdir())))
    answers.close()
    assert 4 <= opened[-1] <= 4 * (1 + 2 * 2)
