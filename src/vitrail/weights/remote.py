"""Checkpoints that are elsewhere: an id to a file in the cache, fetched once and checked against the server's checksum.

The one file that may import huggingface_hub, and only when an id is asked for.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from vitrail.core.errors import UserError
from vitrail.weights.source import STANDARD
from vitrail.weights.storage import Progress, from_storage, place


def fetch(
    source: str, *, base: str | None = None, cache: str | Path | None = None, progress: Progress | None = None
) -> Path:
    """The file (of the hub: the folder) that an id names, fetched unless it is in the cache.

    source: "hf:owner/name[@revision]", "timm:name" for hf:timm/name, "official:" and a name of KNOWN or any path in
        Google's buckets, with or without .npz.
    base: another server. cache: another folder than Hugging Face's (HF_HOME).
    Raises UserError where there is no such thing, no network, or what came is not what the server has.
    """
    kind, name = _parsed(source)
    if kind == "hf":
        return _from_hub(source, name, base, cache)
    from huggingface_hub import constants

    return from_storage(source, name, base, _home(cache), progress, bool(constants.HF_HUB_OFFLINE))


def cached(source: str, *, cache: str | Path | None = None) -> Path | None:
    """What `fetch` would give, where it is in the cache already; None where it is not, or is not whole. Asks no server."""
    kind, name = _parsed(source)
    if kind == "official":
        here = _home(cache) / place(source, name)
        return here if here.is_file() else None
    repository, revision = _repository(source, name)
    from huggingface_hub import try_to_load_from_cache

    def find(name: str) -> Path | None:
        found = try_to_load_from_cache(repository, name, cache_dir=cache, revision=revision)
        return Path(found) if isinstance(found, str) else None

    file = next((file for weights in STANDARD if (file := find(weights)) is not None), None)
    if file is None:
        return None
    names = [file.name] if file.suffix != ".json" else _shards(file)
    try:
        for name in names:
            if (one := find(name)) is None:
                return None
            _check_blob(source, one, _home(cache) / "checked")
    except UserError:
        return None  # it was damaged, and is deleted by now
    return file.parent


def _parsed(source: str) -> tuple[str, str]:
    """("hf" or "official", what stands behind it)."""
    kind, _, name = source.partition(":")
    if kind == "timm":
        kind, name = "hf", f"timm/{name}"
    if kind not in ("hf", "official"):
        raise UserError(f"{source} is no id: write hf:owner/name, official:folder/name or timm:name")
    return kind, name


def _repository(source: str, name: str) -> tuple[str, str | None]:
    """(owner/name, revision)."""
    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{source} is no id of the hub: write hf:owner/name or hf:owner/name@revision")
    return repository, revision or None


def _shards(index: Path) -> list[str]:
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _home(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "vitrail"


def _from_hub(source: str, name: str, endpoint: str | None, cache: str | Path | None) -> Path:
    """The folder of one revision, with its weights and the JSON files that explain them."""
    repository, revision = _repository(source, name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    names, offline = _listed(source, repository, revision, endpoint)
    options: Any = {"repo_id": repository, "revision": revision, "cache_dir": cache}
    options |= {"endpoint": endpoint, "local_files_only": bool(offline)}

    def get(name: str) -> Path | None:
        if not offline and name not in names:
            return None
        try:
            return Path(hf_hub_download(filename=name, **options))
        except LocalEntryNotFoundError:
            return None

    try:
        file = next((file for weights in STANDARD if (file := get(weights)) is not None), None)
        if file is None and offline:
            raise UserError(
                f"{source} cannot be fetched without a network ({offline}), and is not in the cache: fetch its folder "
                "elsewhere and give its path"
            )
        if file is None:
            raise UserError(
                f"{source} has none of {', '.join(STANDARD)}: fetch the file that you want and give its path"
            )
        files = [file]
        if file.suffix == ".json":
            files += [found for shard in _shards(file) if (found := get(shard)) is not None]
        for beside in ("config.json", "preprocessor_config.json"):
            get(beside)
    except OSError as error:
        raise UserError(f"{source} cannot be fetched ({str(error).splitlines()[0]}): try again later") from error
    for one in files:
        _check_blob(source, one, _home(cache) / "checked")
    return file.parent


def _listed(source: str, repository: str, revision: str | None, endpoint: str | None) -> tuple[set[str], str]:
    """(names of its files, ""), or (nothing, why the hub could not be asked)."""
    from huggingface_hub import HfApi, errors

    try:
        info = HfApi(endpoint=endpoint).model_info(repository, revision=revision, timeout=10)
    except errors.GatedRepoError as error:
        raise UserError(f"{source} is gated: ask for access on its page, and log in with `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise UserError(f"there is no {source} on the hub, or it is private: check its name and revision") from error
    except Exception as error:  # its HTTP library, and so what it raises, differs between versions
        return set(), (str(error).splitlines() or [type(error).__name__])[0]
    return {sibling.rfilename for sibling in info.siblings or ()}, ""


def _check_blob(source: str, file: Path, marks: Path) -> None:
    """The cache calls a large file by the sha256 that the hub stated; once a copy was found right, a mark says so."""
    blob = file.resolve()
    mark = marks / blob.name
    if not re.fullmatch(r"[0-9a-f]{64}", blob.name) or mark.exists():
        return
    digest = hashlib.sha256()
    with blob.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != blob.name:
        blob.unlink()
        file.unlink(missing_ok=True)
        raise UserError(
            f"{source} came damaged: the sha256 of {file.name} is {digest.hexdigest()}, and the hub's {blob.name}; the "
            "copy was deleted: ask again"
        )
    marks.mkdir(parents=True, exist_ok=True)
    mark.touch()
