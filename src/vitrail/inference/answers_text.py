"""Answers as lines of text, JSONL or CSV: a file that grows at its end, and so is readable at every moment."""

import csv
import io
import json
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from vitrail.core.errors import UserError
from vitrail.inference.answers import Answer, Answers, Made, entry, printable

COLUMNS = ("picture", "rank", "class", "probability", "reason")


class Text(Answers):
    """Lines at the end of a file, each batch of answers in one write."""

    HEAD = b""

    def __init__(self, path: Path, made: Made, names: Sequence[str]) -> None:
        super().__init__(path, made, names)
        if not self._begun():
            self._append(self.HEAD)

    def _begun(self) -> bool:
        return self.path.stat().st_size > 0

    def _recover(self, names: Sequence[str]) -> None:
        size, end = self.path.stat().st_size, 0
        with self.path.open("rb") as file:
            for picture, best, last in self._whole(file):
                self._met(picture, best is None, names)
                end = last
        end = end or (len(self.HEAD) if size >= len(self.HEAD) else 0)
        if end < size:
            os.truncate(self.path, end)
            self.note = f"the last line of {self.path} was cut short; its picture is looked at again."

    def best(self) -> Iterator[tuple[str, float] | None]:
        with self.path.open("rb") as file:
            for _, best, _ in self._whole(file):
                yield best

    @abstractmethod
    def _whole(self, file: IO[bytes]) -> Iterator[tuple[str, tuple[str, float] | None, int]]:
        """Of each whole answer: its picture, its likeliest class with its probability, and the byte behind it. None: there
        is only a reason."""

    @abstractmethod
    def _text(self, answer: Answer) -> str: ...

    def _keep(self) -> None:
        """Nothing is held back."""

    def _finish(self) -> None:
        """It is whole at any moment."""

    def _write(self, answers: Sequence[Answer]) -> None:
        self._append("".join(map(self._text, answers)).encode())

    def _append(self, data: bytes) -> None:
        try:
            with self.path.open("ab", buffering=0) as file:
                while data:
                    data = data[file.write(data) :]
        except OSError as error:
            raise UserError(
                f"--out {self.path} could not be written ({error.strerror}); what is in it stays: make room and give the "
                "same command again."
            ) from error


class Lines(Text):
    def _text(self, answer: Answer) -> str:
        return json.dumps(entry(answer), ensure_ascii=False) + "\n"

    def _whole(self, file: IO[bytes]) -> Iterator[tuple[str, tuple[str, float] | None, int]]:
        end = 0
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                said = json.loads(line)
                best = None
                if "reason" not in said:
                    best = said["predictions"][0]["class"], float(said["predictions"][0]["probability"])
                yield said["picture"], best, end
            except (ValueError, TypeError, LookupError) as error:
                raise self._damaged(str(self.path)) from error


class Table(Text):
    """CSV with a line for each class of a picture; a picture without an answer has one, with the reason."""

    HEAD = (",".join(COLUMNS) + "\n").encode()

    def _text(self, answer: Answer) -> str:
        name = printable(answer.picture)
        if answer.problem is not None:
            return _csv_line(name, "", "", "", printable(answer.problem))
        return "".join(
            _csv_line(name, rank, label, f"{probability:.6f}", "")
            for rank, (label, probability) in enumerate(answer.classes, 1)
        )

    def _whole(self, file: IO[bytes]) -> Iterator[tuple[str, tuple[str, float] | None, int]]:
        end, best = 0, None

        def lines() -> Iterator[str]:
            nonlocal end
            for line in file:
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                yield line.decode()

        rows = csv.reader(lines(), strict=True)
        try:
            if next(rows, None) not in (None, list(COLUMNS)):
                raise self._damaged(str(self.path))
            for name, rank, label, probability, _ in rows:
                best = (label, float(probability)) if rank == "1" else best if rank else None
                if not rank or int(rank) == self.depth:
                    yield name, best, end
        except (csv.Error, ValueError) as error:
            if str(error) != "unexpected end of data":  # the file ends inside of quotes: it was cut there
                raise self._damaged(str(self.path)) from error


def _csv_line(*fields: str | int) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(
        fields
    )  # it quotes the characters of its line's end, and no others
    return text.getvalue().removesuffix("\r\n") + "\n"
