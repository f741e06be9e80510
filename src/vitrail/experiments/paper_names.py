"""From a name to a recipe of the paper, and from a wrong name to the nearest one or to what the paper leaves empty."""

import difflib
import re
from functools import cache

from vitrail.core.errors import UserError
from vitrail.experiments.paper import CORPORA, LARGE, PUBLIC, RATES, STARTS, TABLE_4, Cell, finetuning, pretraining
from vitrail.experiments.paper_notes import finetuning_notes, pretraining_notes
from vitrail.experiments.paper_results import TABLE_2, Start, before_transfer, transferred


def recipe_names() -> tuple[str, ...]:
    """All there are, those that nothing is published of among them."""
    return tuple(_names())


def names() -> tuple[str, ...]:
    """Of Table 3's cells, then of Table 4's that the paper reports a result of."""
    reported = [
        name
        for name, (start, task, size) in _names().items()
        if task is not None and any(transferred(start, task, bool(size)))
    ]
    return (*(name for name, (_, task, _) in _names().items() if task is None), *reported)


def cell(name: str) -> Cell:
    """The recipe of that name. Raises UserError with the nearest one, or with what the paper leaves empty."""
    plain = name.strip().lower().replace("/", "").replace("_", "-").replace("+", "-")
    plain = _names_also().get(plain, plain)
    if plain not in _names():
        raise UserError(_unknown(name, plain))
    start, task, size = _names()[plain]
    if task is None:
        return Cell(
            plain, start, None, pretraining(start), tuple(before_transfer(start)), tuple(pretraining_notes(start))
        )
    published, notes = tuple(transferred(start, task, bool(size))), tuple(finetuning_notes(start, task, size))
    return Cell(plain, start, task, finetuning(start, task, size), published, notes, PUBLIC.get(start, ""))


def start_name(start: Start) -> str:
    """As `vit-l16-jft`; with its length where a longer one has the plain name."""
    longest = max(other.epochs for other in STARTS if other[:2] == start[:2])
    ending = "" if start.epochs == longest else f"-{start.epochs}ep"
    return f"{_model_word(start.model)}-{start.corpus}{ending}"


def _model_word(model: str) -> str:
    return model.lower().replace("/", "").replace("+", "-")


@cache
def _names() -> dict[str, tuple[Start, str | None, int]]:
    """Each name's start, task (None: the start itself) and Table 2's resolution (0: Table 4's)."""
    found: dict[str, tuple[Start, str | None, int]] = {start_name(start): (start, None, 0) for start in RATES}
    for start in STARTS:
        for task in TABLE_4:
            name = f"finetune-{start_name(start)}-{task.replace('/', '-')}"
            found[name] = (start, task, 0)
            if task == "imagenet" and start in TABLE_2:
                found[f"{name}-{LARGE[start.model]}"] = (start, task, LARGE[start.model])
    return found


@cache
def _names_also() -> dict[str, str]:
    """Other spellings: the length said though it is the longest; no start, which is the public one, else JFT-300M."""
    found = {}
    for name, (start, _, _) in _names().items():
        plain, model = start_name(start), _model_word(start.model)
        found[name.replace(plain, f"{model}-{start.corpus}-{start.epochs}ep", 1)] = name
    for corpus in ("jft", "i21k"):
        for name, (start, task, _) in _names().items():
            if task is not None and start.corpus == corpus and "ep-" not in name:
                found[name.replace(f"-{corpus}-", "-", 1)] = name
    return {also: name for also, name in found.items() if also not in _names()}


def _unknown(name: str, plain: str) -> str:
    words = "|".join(sorted({_model_word(start.model) for start in STARTS}, key=len, reverse=True))
    asked = re.match(rf"(?:finetune-)?({words})-({'|'.join(CORPORA)})(?:-(\d+)ep)?(?:-|$)", plain)
    near = difflib.get_close_matches(plain, (*_names(), *_names_also()), n=1, cutoff=0.0)[0]
    near = _names_also().get(near, near)
    if asked is not None:
        same = [start for start in STARTS if start[1] == asked[2] and _model_word(start.model) == asked[1]]
        title = CORPORA[asked[2]].title
        if not same:
            has = ", ".join(dict.fromkeys(start.model for start in STARTS if start.corpus == asked[2]))
            return (
                f"{name}: the paper leaves this cell empty; on {title} it trained {has} (the nearest recipe: {near})."
            )
        if not plain.startswith("finetune-") and not any(start in RATES for start in same):
            return (
                f"{name}: the paper leaves this cell empty (Table 3 has no settings for {same[0].model} on {title}, though "
                f"results of it are reported); there is finetune-{start_name(same[0])}-TASK, and the nearest is {near}."
            )
    return f"there is no recipe named {name!r}; the nearest is {near} (vitrail recipes lists all)."
