"""Tensors to files. What the system said (a full disk, no permission) is an OSError, as `core.runs.write_whole` wants it."""

import errno
import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vitrail.core.errors import UserError


def save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    # safetensors would close the file to all others; a touched one has the permissions that files have here.
    path.touch()
    permissions = path.stat().st_mode
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        # It wraps what the system said: "... (os error 28)".
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code)) from error
    path.chmod(permissions)


def make_folder(folder: Path) -> None:
    """With all above it. Raises UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made ({error.strerror}): choose another place") from error
