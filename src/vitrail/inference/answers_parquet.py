"""Answers as parquet, whose index stands at its end: parts are written whole into FILE.parts, and joined when all are there.

The joined file has row groups of a fixed size, wherever the parts ended.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitrail.core.runs import write_whole
from vitrail.inference.answers import Answer, Answers, Made, printable

PART_ROWS, PART_SECONDS = 4096, 20.0
"""When a part is written: so many answers, or so much time, is the most that a kill costs."""
GROUP_ROWS = 16384
"""Of the joined file's row groups, which bound the memory of joining and of reading."""


class Parquet(Answers):
    def __init__(self, path: Path, made: Made, names: Sequence[str]) -> None:
        self.parts = path.with_name(path.name + ".parts")
        self._waiting: list[Answer] = []
        self._since = time.monotonic()
        super().__init__(path, made, names)
        self._written = self.done

    def _lock_place(self) -> Path:
        with suppress(OSError):  # the lock says why, in one sentence
            self.parts.mkdir(exist_ok=True)
        return self.parts / ".lock"

    def _files(self) -> list[Path]:
        return sorted(self.parts.glob("*.parquet"))

    def _begun(self) -> bool:
        return self.path.exists() or bool(self._files())

    def _recover(self, names: Sequence[str]) -> None:
        if self.path.exists():  # written whole; parts beside it were joined into it
            for file in self._files():
                file.unlink()
            self._count(self.path, names)
            if self.done < len(names):
                self.path.rename(self._place(0))
            return
        for file in self._files():
            if file != self._place(self.done):
                raise self._damaged(str(self.parts))
            self._count(file, names)

    def _place(self, first: int) -> Path:
        return self.parts / f"{first:012d}.parquet"

    def _count(self, file: Path, names: Sequence[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            for some in pq.ParquetFile(file).iter_batches(columns=["picture", "reason"]):
                for picture, reason in zip(*(column.to_pylist() for column in some.columns), strict=True):
                    self._met(picture, reason is not None, names)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(str(file)) from error

    def best(self) -> Iterator[tuple[str, float] | None]:
        import pyarrow.parquet as pq

        for file in [self.path] if self.path.exists() else self._files():
            for some in pq.ParquetFile(file).iter_batches(columns=["classes", "probabilities"]):
                for names, values in zip(*(column.to_pylist() for column in some.columns), strict=True):
                    yield (names[0], values[0]) if names else None

    def _write(self, answers: Sequence[Answer]) -> None:
        self._waiting += answers
        if len(self._waiting) >= PART_ROWS or time.monotonic() - self._since > PART_SECONDS:
            self._keep()

    def _keep(self) -> None:
        if self._waiting:
            import pyarrow.parquet as pq

            table = _arrow(self._waiting)
            write_whole(self._place(self._written), lambda part: pq.write_table(table, part))
            self._written, self._waiting = self._written + table.num_rows, []
        self._since = time.monotonic()

    def _finish(self) -> None:
        self._keep()
        if not self.path.exists():
            write_whole(self.path, self._join)
        for file in self._files():
            file.unlink()

    def close(self) -> None:
        super().close()
        if not self._files():
            shutil.rmtree(self.parts, ignore_errors=True)

    def _join(self, place: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        def tables() -> Iterator[Any]:
            held = _arrow([])
            for file in self._files():
                for some in pq.ParquetFile(file).iter_batches(batch_size=GROUP_ROWS):
                    held = pa.concat_tables([held, pa.Table.from_batches([some])])
                    while held.num_rows >= GROUP_ROWS:
                        yield held.slice(0, GROUP_ROWS)
                        held = held.slice(GROUP_ROWS)
            yield held

        with pq.ParquetWriter(place, _arrow([]).schema) as writer:
            for table in tables():
                writer.write_table(table.combine_chunks(), row_group_size=GROUP_ROWS)


def _arrow(answers: Sequence[Answer]) -> Any:
    """A row a picture; classes and probabilities are lists, empty where there is a reason."""
    import pyarrow as pa

    columns = {
        "picture": pa.array([printable(answer.picture) for answer in answers], pa.string()),
        "classes": pa.array([[name for name, _ in answer.classes] for answer in answers], pa.list_(pa.string())),
        "probabilities": pa.array([[p for _, p in answer.classes] for answer in answers], pa.list_(pa.float64())),
        "reason": pa.array([answer.problem and printable(answer.problem) for answer in answers], pa.string()),
    }
    return pa.table(columns)
