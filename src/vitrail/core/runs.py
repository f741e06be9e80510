"""The run folder: everything that a training run leaves behind, and what it needs to go on.

Files are written to the side and renamed, so that whatever moment a run dies at, each file is a whole one, old or new.
"""

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vitrail.core.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
FORMAT = 1
"""Version of the folder's layout; a newer one is refused."""


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a path beside `path`, and renames the result onto `path` once it is safely on the disk.

    Raises UserError when it cannot be written (a full disk, no permission); `path` is then as it was.
    """
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if not part.is_dir():  # somebody's folder of that name was in the way
            part.unlink(missing_ok=True)
        full = error.errno in FULL
        reason = "no space is left on the disk" if full else error.strerror or str(error)
        advice = "free some space" if full else "make the folder writable"
        kept = "its last good version is kept" if path.exists() else "nothing was there before"
        raise UserError(f"{path} could not be written: {reason}; {kept}; {advice} and continue.") from error


def save_tensors(data: Any, path: Path) -> None:
    """`torch.save` through a file of our own: its own writer hides what the system said, such as that the disk is full."""
    try:
        with path.open("wb") as file:
            torch.save(data, file)
    except RuntimeError as error:
        # After a write that failed, it also fails to close its archive, and says only that.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def write_json(path: Path, data: Any) -> None:
    write_whole(path, lambda part: _write_text(part, json.dumps(data, indent=2, ensure_ascii=False) + "\n"))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises UserError where the file is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; give the folder of a Vitrail run.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it from a copy.") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl that are whole; none where there is no file."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    whole = []
    for line in lines:
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:
            break  # a line that was being written when the process died; nothing comes after it
    return whole


class RunFolder:
    """One run's folder, held by one process at a time.

    config.json (settings, versions, data), split.json, model.safetensors (best), last.safetensors, state.pt (all that
    resuming needs), metrics.jsonl, results.json, curves.png, report.html, TensorBoard's event files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"--out {path} cannot be used as a run folder ({error.strerror}); give a folder that can be written."
            ) from error
        try:
            # The system lets go of the lock when the process ends, however it ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            found = (
                "is in use by another run" if isinstance(error, BlockingIOError) else f"has no locks ({error.strerror})"
            )
            raise UserError(f"--out {path} {found}; wait for it to end or give another folder.") from error
        # A forked data worker outlives a killed run by seconds and would hold its lock for as long.
        os.register_at_fork(after_in_child=self._lock.close)

    def close(self) -> None:
        self._lock.close()

    def file(self, name: str) -> Path:
        return self.path / name

    @property
    def started(self) -> bool:
        return self.file("config.json").exists()

    @property
    def resumable(self) -> bool:
        return self.file("state.pt").exists()

    def save_state(self, state: dict[str, Any]) -> None:
        write_whole(self.file("state.pt"), lambda part: save_tensors({"format": FORMAT, **state}, part))

    def load_state(self) -> dict[str, Any]:
        """Raises UserError when the checkpoint is cut, is no Vitrail state or comes from a newer version."""
        path = self.file("state.pt")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen kinds for a file that was cut
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}): it was cut or damaged; delete it to start this run "
                "again from the beginning."
            ) from error
        if not isinstance(state, dict) or not isinstance(state.get("format"), int) or "step" not in state:
            raise UserError(f"{path} is not a Vitrail training state; give the folder of a Vitrail run.")
        if state["format"] > FORMAT:
            raise UserError(
                f"{path} was written in format {state['format']}, newer than this version's {FORMAT}; update vitrail."
            )
        return state

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl that are whole."""
        return read_metrics(self.file("metrics.jsonl"))

    def cut_metrics(self, step: int) -> None:
        """Drops what was measured after `step`, so that a run that goes on from there does not say it twice."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(self.file("metrics.jsonl"), lambda part: _write_text(part, text))
