"""`--data NAME:PATH`: published sets in their owners' files. Which name is read by what; the reading is in the files beside.

imagenet, imagenet-v2, imagenet-a, imagenet-r, imagenet-sketch, objectnet (data/imagenet.py); cifar10, cifar100, pets,
flowers (data/published.py); vtab/TASK for the 19 tasks of VTAB-1k (data/vtab_sample.py). A set that only measures has no
"train" among its sources.
"""

import difflib
from pathlib import Path

from vitrail.core.errors import UserError
from vitrail.core.types import Source
from vitrail.data import imagenet, published, vtab, vtab_sample
from vitrail.data.published import Keyed
from vitrail.data.sources import Read, listed

VARIANTS = ("imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch")
ARCHIVES = {
    "cifar10": (lambda path: published.cifar(path, 10), "the binary or the python version of CIFAR-10, unpacked"),
    "cifar100": (lambda path: published.cifar(path, 100), "the binary or the python version of CIFAR-100, unpacked"),
    "pets": (published.pets, "images/ and annotations/ of Oxford-IIIT Pets"),
    "flowers": (published.flowers, "jpg/, imagelabels.mat and setid.mat of Flowers-102"),
}
NAMES = ("imagenet", *VARIANTS, "objectnet", *ARCHIVES, *(f"vtab/{name}" for name in vtab.TASKS))


def named(spec: str) -> tuple[str, Path] | None:
    """The name and the path of a spec of this kind, None for any other.

    Raises UserError on vtab/ and a name that is no task.
    """
    name, colon, path = spec.partition(":")
    if name in NAMES and colon:
        return name, Path(path).expanduser()
    if name.startswith("vtab/") and colon:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
        raise UserError(f"{name} is no task of VTAB-1k; the nearest is {near}.")
    return None


def read(name: str, path: Path) -> Read:
    """The sources of a published set, by split. Raises UserError on whatever is missing or damaged."""
    if not path.is_dir():
        raise UserError(f"{name}:{path} does not exist: give the folder that its owners' archive unpacks to.")
    if name == "imagenet":
        return imagenet.imagenet(path)
    if name == "objectnet":
        return imagenet.objectnet(path)
    if name in VARIANTS:
        return imagenet.variant(path, name)
    if name.startswith("vtab/"):
        return vtab_sample.read(name.removeprefix("vtab/"), path)
    reader, what = ARCHIVES[name]
    found: Keyed | None = reader(path)
    if found is None:
        inside = listed(sorted(entry.name for entry in path.iterdir())) or "nothing"
        raise UserError(f"{path} is not {what}: it holds {inside}.")
    sources: dict[str, Source] = {split: source for split, (source, _) in found.items()}
    return sources, ()
