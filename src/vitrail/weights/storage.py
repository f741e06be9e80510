"""Google's storage, where the official checkpoints lie. What is fetched is checked against the server's own checksum.

A transfer that was cut goes on where it ended, in this call or the next, as long as the server still has the same file.
"""

import base64
import difflib
import fcntl
import hashlib
import http.client
import json
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from vitrail.core.checksums import crc32c_of_file
from vitrail.core.errors import UserError

STORAGE = "https://storage.googleapis.com"
BUCKETS = ("bit_models", "big_vision")
"""Google's, named by an id's first word; all else is in vit_models."""

TRIES = 5
PAUSE = 0.5
"""Seconds before the second try, doubled with each further one that brings nothing."""
PATIENCE = 30.0
"""Seconds without a byte after which a connection counts as lost."""

Progress = Callable[[str, int, int], None]
"""Told a file's name, the bytes that are here and the bytes in all, several times a second."""


class Known(NamedTuple):
    """size: in MiB. note: what it was trained on, and its published ImageNet accuracy."""

    id: str
    path: str
    size: int
    note: str


def _plain(folder: str, names: dict[str, int], note: str) -> Iterator[Known]:
    for name, size in names.items():
        yield Known(f"official:{folder}/{name}", f"vit_models/{folder}/{name}.npz", size, note)


def _augreg(name: str, recipe: str, tuning: str, size: int, tuned_size: int, accuracy: float) -> Iterator[Known]:
    file = f"vit_models/augreg/{name}-i21k-300ep-lr_0.001-{recipe}"
    tuned = f"{file}--imagenet2012-steps_20k-lr_{tuning}-res_384.npz"
    yield Known(f"official:augreg/{name}", f"{file}.npz", size, "ImageNet-21k, AugReg")
    note = f"ImageNet-21k, then ImageNet at 384 px, AugReg: {accuracy:.2f} %"
    yield Known(f"official:augreg/{name}-imagenet2012-384", tuned, tuned_size, note)


# google-research/vision_transformer: README (names, sizes, accuracies), vit_jax.ipynb (the listing of the bucket).
KNOWN = (
    *_plain(
        "imagenet21k",
        {
            "ViT-B_32": 400,
            "ViT-B_16": 394,
            "ViT-B_8": 394,
            "ViT-L_32": 1260,
            "ViT-L_16": 1250,
            "ViT-H_14": 2519,
            "R26+ViT-B_32": 450,
            "R50+ViT-B_16": 440,
            "R50+ViT-L_32": 1341,
        },
        "ImageNet-21k; the head is all zeros",
    ),
    *_plain(
        "imagenet21k+imagenet2012",
        {
            "ViT-B_32": 337,
            "ViT-B_16-224": 330,
            "ViT-B_16": 331,
            "ViT-B_8": 335,
            "ViT-L_32": 1167,
            "ViT-L_16-224": 1157,
            "ViT-L_16": 1167,
            "R50+ViT-B_16": 378,
        },
        "ImageNet-21k, then ImageNet at 384 px (224 where the name says so)",
    ),
    *_augreg("Ti_16", "aug_none-wd_0.03-do_0.0-sd_0.0", "0.03", 37, 22, 78.22),
    *_augreg("S_32", "aug_none-wd_0.1-do_0.0-sd_0.0", "0.01", 118, 87, 79.58),
    *_augreg("S_16", "aug_light1-wd_0.03-do_0.0-sd_0.0", "0.03", 115, 85, 83.73),
    *_augreg("B_32", "aug_light1-wd_0.1-do_0.0-sd_0.0", "0.01", 398, 337, 83.59),
    *_augreg("B_16", "aug_medium1-wd_0.1-do_0.0-sd_0.0", "0.03", 391, 331, 85.49),
    *_augreg("L_16", "aug_strong1-wd_0.1-do_0.0-sd_0.0", "0.01", 1243, 1162, 85.59),
    *_augreg("R_Ti_16", "aug_none-wd_0.03-do_0.0-sd_0.0", "0.03", 40, 24, 75.40),
    *_augreg("R26_S_32", "aug_light1-wd_0.1-do_0.0-sd_0.0", "0.01", 170, 139, 83.85),
    *_augreg("R50_L_32", "aug_medium1-wd_0.1-do_0.1-sd_0.1", "0.01", 1337, 1255, 85.99),
)


def from_storage(
    source: str, name: str, base: str | None, home: Path, progress: Progress | None, offline: bool
) -> Path:
    """The file of `name`, from `home` or, where it is not there, from `base`. offline: not to touch the network."""
    path = place(source, name)
    file = home / path
    if file.is_file():
        return file
    url = f"{base or STORAGE}/{urllib.parse.quote(path)}"
    if offline:
        raise _no_network(source, url, file, "HF_HUB_OFFLINE is set")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The processes of one run all want the file; the first fetches it.
        with file.with_name(file.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.is_file():
                _download(source, url, file, progress or show)
    except urllib.error.HTTPError as error:
        if error.code not in (403, 404):
            raise UserError(f"{url} answers {error.code} {error.reason}: try again later") from error
        near = difflib.get_close_matches(source, [known.id for known in KNOWN], n=1, cutoff=0.0)[0]
        raise UserError(
            f"there is no {source} at {url}: the nearest that is known is {near} (vitrail models --remote lists all)"
        ) from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise _no_network(source, url, file, getattr(error, "reason", error)) from error
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror}): make room, or set HF_HOME to another folder"
        ) from error
    return file


def place(source: str, name: str) -> str:
    """Where an id's file lies, in the storage and in the cache."""
    path = next((known.path for known in KNOWN if known.id == source), None)
    if path is None:
        if not re.fullmatch(r"\w[\w+.=-]*(/\w[\w+.=-]*)+", name):
            raise UserError(f"{source} is no id of Google's storage: write official:imagenet21k/ViT-B_16 or the like")
        path = name if name.startswith(BUCKETS) else f"vit_models/{name}"
        path = path if path.endswith(".npz") else f"{path}.npz"
    return path


def _no_network(source: str, url: str, file: Path, reason: object) -> UserError:
    return UserError(
        f"{source} cannot be fetched from {url} without a network ({reason}): fetch it elsewhere and give its path, or put "
        f"it at {file}"
    )


class _Cut(Exception):
    """The connection ended before the file did."""


def _download(source: str, url: str, file: Path, progress: Progress) -> None:
    """In as many pieces as it takes; the file appears under its name when it is whole and right."""
    part, about = file.with_name(file.name + ".part"), file.with_name(file.name + ".part.json")
    fruitless = 0
    while True:
        before = _size(part)
        try:
            headers = _transfer(url, part, about, lambda here, whole: progress(file.name, here, whole))
            break
        except (_Cut, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            fruitless = 0 if _size(part) > before else fruitless + 1
            if fruitless == TRIES:
                raise UserError(
                    f"{source} was cut {TRIES} times in a row at {before:,} bytes ({str(error) or type(error).__name__}): "
                    "ask again, and it goes on from there"
                ) from error
            time.sleep(PAUSE * 2**fruitless)
    sha256 = _check(source, part, headers)
    record = {"source": source, "url": url, "bytes": _size(part), "sha256": sha256, **headers}
    file.with_name(file.name + ".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
    about.unlink(missing_ok=True)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _transfer(url: str, part: Path, about: Path, progress: Callable[[int, int], None]) -> dict[str, str]:
    """What is missing of `part`; returns the headers that tell what the whole must be.

    about: the ETag that the bytes in `part` belong to, so that two versions of a file are never joined.
    """
    here = _size(part) if about.exists() else 0
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "vitrail"})
    if here:
        request.add_header("Range", f"bytes={here}-")
        request.add_header("If-Range", json.loads(about.read_text(encoding="utf-8"))["etag"])
    try:
        answer = urllib.request.urlopen(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink()  # longer than the server's file: it is another one
        raise _Cut("the server has another file now") from error
    with answer:
        if answer.status != 206:
            here = 0
        whole = here + int(answer.headers.get("Content-Length", 0))
        etag = answer.headers.get("ETag", "")
        if here == 0:
            part.unlink(missing_ok=True)
            about.unlink(missing_ok=True)
            if etag:
                about.write_text(json.dumps({"etag": etag}), encoding="utf-8")
        with part.open("ab") as out:
            shown = 0.0
            while piece := answer.read(1 << 18):
                out.write(piece)
                here += len(piece)
                if time.monotonic() - shown > 0.2:
                    shown = time.monotonic()
                    progress(here, whole)
    if here < whole:
        raise _Cut(f"at {here:,} of {whole:,} bytes")
    progress(here, here)
    return {"etag": etag, "checksums": ",".join(answer.headers.get_all("x-goog-hash") or [])}


def _check(source: str, part: Path, headers: dict[str, str]) -> str:
    """The file's sha256, once its own checksum is the server's."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with part.open("rb") as opened:
        while piece := opened.read(1 << 20):
            md5.update(piece)
            sha256.update(piece)
    stated = dict(re.findall(r"(crc32c|md5)=([\w+/=]+)", headers["checksums"]))
    if "md5" in stated:
        kind, found = "md5", md5.digest()
    elif "crc32c" in stated:
        kind, found = "crc32c", crc32c_of_file(part)
    else:
        return sha256.hexdigest()
    if base64.b64encode(found).decode() != stated[kind]:
        part.unlink()
        raise UserError(
            f"{source} came damaged: its {kind} is {base64.b64encode(found).decode()}, and the server's {stated[kind]}; "
            "the copy was deleted: ask again"
        )
    return sha256.hexdigest()


def show(name: str, here: int, whole: int) -> None:
    """One line on a terminal, rewritten; nothing elsewhere."""
    if sys.stderr.isatty():
        share = (
            f"{100 * here / whole:3.0f} %, {here >> 20:,} of {whole >> 20:,} MiB" if whole else f"{here >> 20:,} MiB"
        )
        print(f"\r{name}: {share}\x1b[K", end="\n" if here == whole else "", file=sys.stderr, flush=True)
