"""Answers to pictures, written down as they come: JSONL, CSV or parquet; and gone on with after whatever ended it.

Unusual: there is no journal. A file of answers is itself the state: what stands in it is compared with the pictures, name
by name, and the work goes on behind the last whole answer. Text grows at its end, so that a kill can only cut its last
line, which is dropped. Parquet has its index at the end and cannot grow: parts are written whole into FILE.parts and
joined once all are there, into row groups of a fixed size; so a run that was broken off leaves the very same file.

Beside it lies FILE.settings.json: the model and the settings that the answers came from. Other ones are refused.
"""

import fcntl
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from vitrail.core.errors import UserError
from vitrail.core.runs import read_json, write_json

Made = dict[str, Any]
"""Where answers come from: "model" (a digest), "top" (how many classes each has), and the flags that change an answer.
All values are such as JSON has."""


@dataclass(frozen=True)
class Answer:
    """The likeliest classes of a picture and their probabilities, the likeliest first; or why there are none."""

    picture: str
    classes: tuple[tuple[str, float], ...] = ()
    problem: str | None = None


def record_of(path: Path) -> Path:
    """Where it stands what the answers in a file came from."""
    return path.with_name(path.name + ".settings.json")


def recorded(path: Path) -> dict[str, Any]:
    """That; nothing where it is not there or cannot be read."""
    try:
        found = json.loads(record_of(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Answers(ABC):
    """A file of answers, open at its end; a context manager that finishes it, or keeps what is there after an error.

    names: of all the pictures, in the answers' order. done: how many answers the file holds. lost: how many of them say
    why there is none. note: a sentence on what was found when it was opened, or "".
    Raises UserError where it cannot be written, is being written, or holds answers to something else.
    """

    def __init__(self, path: Path, made: Made, names: Sequence[str]) -> None:
        self.path, self.depth = path, int(made["top"])
        self.record = record_of(path)
        self.done = self.lost = 0
        self.note = ""
        self._lock = self._locked()
        try:
            if self._begun():
                self._compare(made)
                self._recover(names)
            else:
                write_json(self.record, made)
        except BaseException:
            self.close()
            raise

    def add(self, answers: Sequence[Answer]) -> None:
        """The next answers, in the pictures' order. Raises UserError where they cannot be written."""
        self.done += len(answers)
        self.lost += sum(answer.problem is not None for answer in answers)
        self._write(answers)

    @abstractmethod
    def best(self) -> Iterator[tuple[str, float] | None]:
        """The likeliest class, with its probability, of each answer that is on the disk; None where it is only a reason."""

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> "Answers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
            else:
                with suppress(UserError):  # what ended it is said already
                    self._keep()
        finally:
            self.close()

    def _locked(self) -> IO[bytes]:
        """Two processes that write the same answers would mix them; the system lets go when a process ends."""
        place = self._lock_place()
        try:
            lock = place.open("ab")
        except OSError as error:
            raise UserError(f"--out {self.path} cannot be written ({error.strerror}); give another file.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise UserError(f"--out {self.path} is being written by another process; wait, or give another.") from error
        os.register_at_fork(after_in_child=lock.close)  # a decoding process outlives a killed run by seconds
        return lock

    def _compare(self, made: Made) -> None:
        """Raises UserError unless the file's answers are of the same model and settings."""
        advice = "give another --out, or delete this one"
        if not self.record.exists():
            raise UserError(
                f"--out {self.path} holds something already, and no {self.record.name} says what; {advice}."
            )
        before = read_json(self.record)
        before = before if isinstance(before, dict) else {}
        made = json.loads(json.dumps(made))
        before.setdefault("asked", made.get("asked"))  # earlier versions do not say
        for name in made:
            if before.get(name) == made[name]:
                continue
            if name == "model":
                raise UserError(f"--out {self.path} was begun with another model; {advice}.")
            was, now = (json.dumps(value.get(name)) for value in (before, made))
            raise UserError(f"--out {self.path} was begun with {name} {was}, which is now {now}; {advice}.")

    def _met(self, picture: str, lost: bool, names: Sequence[str]) -> None:
        """Counts an answer that is there already. Raises UserError where it answers to another picture."""
        wanted = printable(names[self.done]) if self.done < len(names) else "nothing more"
        if picture != wanted:
            raise UserError(
                f"--out {self.path} has {picture} as picture {self.done + 1}, where the command line names {wanted}; name "
                "the same pictures, or give another --out."
            )
        self.done, self.lost = self.done + 1, self.lost + lost

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{what} is damaged behind answer {self.done:,}; restore it, or delete it to begin again.")

    def _lock_place(self) -> Path:
        return self.path

    @abstractmethod
    def _begun(self) -> bool:
        """Whether there is anything to go on with."""

    @abstractmethod
    def _recover(self, names: Sequence[str]) -> None:
        """Calls `_met` for each answer that is there, and drops what is behind the last whole one."""

    @abstractmethod
    def _write(self, answers: Sequence[Answer]) -> None: ...

    @abstractmethod
    def _keep(self) -> None:
        """Writes what is only in memory."""

    @abstractmethod
    def _finish(self) -> None:
        """All answers were given."""


def kind_of(path: Path) -> type[Answers]:
    """The class of answers that a file's suffix asks for. Raises UserError where there is none."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        from vitrail.inference.answers_parquet import Parquet

        return Parquet
    from vitrail.inference.answers_text import Lines, Table

    if suffix not in (".jsonl", ".csv"):
        raise UserError(f"--out {path} has no known form; let it end in .jsonl, .csv or .parquet.")
    return Lines if suffix == ".jsonl" else Table


def printable(name: str) -> str:
    """File names need not be valid UTF-8; what is printed must be."""
    return name.encode("utf-8", "backslashreplace").decode()


def entry(answer: Answer) -> dict[str, Any]:
    """An answer as an object of JSON."""
    if answer.problem is not None:
        return {"picture": printable(answer.picture), "reason": printable(answer.problem)}
    predictions = [{"class": name, "probability": probability} for name, probability in answer.classes]
    return {"picture": printable(answer.picture), "predictions": predictions}
