"""`vitrail recipes`: every recipe of the paper with its published numbers; `vitrail recipe NAME`: all of one of them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from vitrail.core.device import pick_device
from vitrail.core.errors import UserError
from vitrail.core.values import to_json
from vitrail.experiments.paper import CORPORA, LARGE, STARTS, TABLE_4, Cell, Corpus, Task
from vitrail.experiments.paper_names import cell, names, recipe_names, start_name
from vitrail.experiments.paper_results import (
    TABLE_2,
    TABLE_2_VTAB,
    TABLE_6,
    TABLE_9,
    TASKS,
    TPU_CORE_DAYS,
    VTAB_TASKS,
    transferred,
)
from vitrail.experiments.recipe import flat

PLAIN_TASKS = tuple(task for task in TABLE_4 if task not in VTAB_TASKS)


@dataclass(frozen=True)
class Settings:
    words: tyro.conf.Positional[tuple[str, ...]] = ()
    """Parts of a name, as b16 cifar10: only the recipes whose names hold them all, a line each."""
    json: bool = False
    """Print JSON, one list, instead of tables."""
    markdown: bool = False
    """Print the tables as Markdown, as docs/recipes.md has them."""


@dataclass(frozen=True)
class OneSettings:
    name: tyro.conf.Positional[str]
    """As vit-b16-i21k or finetune-vit-b16-cifar10; `vitrail recipes` lists them."""
    measure: bool = False
    """Measure a training step on this machine, and say how many hours the recipe would take."""
    device: str = ""
    """What to measure on: cpu, cuda, cuda:1, mps; none: the fastest there is."""
    json: bool = False
    """Print everything as one JSON object."""


@dataclass(frozen=True)
class Table:
    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def run(settings: Settings) -> int:
    """Lists the recipes of the paper's Tables 3 and 4 with their costs and published results."""
    words = [f"-{word.lower().strip('-')}-" for word in settings.words]
    found = [name for name in (recipe_names() if words else names()) if all(word in f"-{name}-" for word in words)]
    if not found:
        raise UserError(
            f"no recipe's name holds {' and '.join(settings.words)}; vitrail recipes without words lists all of them."
        )
    if settings.json:
        print(json.dumps([_line(cell(name)) for name in found], indent=2))
    elif settings.markdown:
        print("\n\n".join(_markdown(table) for table in (_listed(found) if words else _all())))
    else:
        _show(_listed(found) if words else _all())
        print("vitrail recipe NAME says all of one; vitrail run NAME --data PATH carries it out.")
    return 0


def run_one(settings: OneSettings) -> int:
    """Says what a recipe is: its settings, what is published of it, its cost, and what the paper leaves open."""
    from vitrail.experiments.paper_costs import measure

    asked = cell(settings.name)
    measured = measure(asked, device := pick_device(settings.device or None)) if settings.measure else None
    here = {}
    if measured is not None:
        hours = measured.hours(asked.pictures)
        here = {**to_json(measured), "device": str(device), "hours": hours}
    if settings.json:
        told = {**_line(asked), "notes": asked.notes, "evaluators": asked.evaluators, "settings": flat(asked.recipe)}
        print(json.dumps({**told, **({"measured": here} if here else {})}, indent=2))
        return 0
    print(f"{asked.name}: {_title(asked)} ({asked.table})\n")
    needed = "" if asked.weights or asked.task is None else " --weights RUN"
    print(f"  vitrail run {asked.name} --data {asked.data}=PATH{needed}\n")
    for label, line in _facts(asked, here):
        print(f"{label:<13}{line}")
    for note in asked.notes:
        print(f"{'note':<13}{note}")
    return 0


def _title(asked: Cell) -> str:
    corpus = CORPORA[asked.start.corpus]
    if asked.task is None:
        return f"{asked.start.model}, pre-trained on {corpus.title}, {asked.start.epochs} epochs"
    return f"{asked.start.model} of {corpus.title} ({asked.start.epochs} epochs), fine-tuned on {TABLE_4[asked.task].title}"


def _facts(asked: Cell, here: dict[str, Any]) -> Iterator[tuple[str, str]]:
    recipe, source = asked.recipe, asked.source
    model, rule, pace = recipe.model, recipe.optimiser, recipe.schedule
    if asked.task is None:
        head = f"a hidden tanh layer of {model.representation}, then " if model.representation else ""
        table = "" if model.positions == "planned" else f", {model.positions} positions"
        yield "model", f"{model.model}{table}, {model.pool} pooling, dropout {model.dropout:g}"
        yield "head", f"{head}linear to {source.classes:,} classes, bias {model.head_bias:g}"
    else:
        yield "weights", asked.weights or f"--weights, of {start_name(asked.start)}: none are public"
        yield "head", f"a new one of zeros, linear to {source.classes:,} classes; dropout {model.dropout:g}"
    held = f"{recipe.data.validation:.1%}" if recipe.data.validation else "none"
    yield "data", f"{source.title}: {source.pictures:,} pictures to train on, of which {held} held out"
    crop = "Inception crop" if recipe.data.crop == "inception" else "no crop"
    flip = "flip" if recipe.augmentation.flip else "no flip"
    yield "pictures", f"{recipe.data.size[0]} px, {crop} and {flip}; evaluated whole, resized"
    clip = f"clipped at norm {rule.clip:g}" if rule.clip else "no clipping"
    momentum = (
        f"betas {rule.betas[0]:g}, {rule.betas[1]:g}" if rule.optimiser == "adam" else f"momentum {rule.momentum:g}"
    )
    average = f", Polyak {rule.polyak:g}" if rule.polyak else ""
    yield "loss", f"{recipe.loss.loss} cross-entropy"
    decay = f"weight decay {rule.weight_decay:g} ({rule.decay})"
    yield "optimiser", f"{rule.optimiser}, rate {rule.rate:g}, {momentum}, {decay}, {clip}{average}"
    if isinstance(source, Task) and len(source.rates) > 1:
        yield (
            "sweep",
            f"rates {', '.join(f'{rate:g}' for rate in source.rates)} on {source.held_out:.0%} held out (--sweep)",
        )
    ends = f" to a rate of {pace.end * rule.rate:g}" if pace.schedule == "linear" else ""
    steps = round(asked.pictures / recipe.data.batch)
    yield "schedule", f"{pace.warmup:,} steps of warm-up, then {pace.schedule}{ends}"
    length = f"{asked.start.epochs} epochs, " if asked.task is None else ""
    yield "length", f"{length}{steps:,} steps of {recipe.data.batch:,} pictures"
    for line in asked.evaluators:
        yield "measured by", line
    for known in asked.published:
        yield "published", f"{known.value:.2f} %, {known.what} ({known.source})"
    if not asked.published:
        yield "published", "nothing of this by itself"
    then = () if asked.task else tuple(transferred(asked.start, "imagenet"))
    for known in then[:1]:
        more = f"vitrail recipes finetune-{asked.name}"
        yield "published", f"{known.value:.2f} % fine-tuned on ImageNet ({known.source}); {more}"
    yield "cost", f"{asked.exaflops:,.4g} exaFLOPs{_printed_costs(asked)}"
    if here:
        hours, years = here["hours"], f" ({here['hours'] / 8766:,.1f} years)" if here["hours"] > 8766 else ""
        step = f"a step of {here['batch']} took {here['seconds']:.2f} s in {here['precision']}, decoding left out"
        yield "here", f"{hours:,.1f} hours{years} on {here['device']}: {step}"
    else:
        yield "here", "--measure says how many hours on this machine"


def _printed_costs(asked: Cell) -> str:
    if asked.task is not None:
        return ""
    found = []
    if asked.start in TABLE_6:
        found.append(f"Table 6 prints {TABLE_6[asked.start][1]:,}")
    if asked.start in TPU_CORE_DAYS:
        found.append(f"Table 2 {TPU_CORE_DAYS[asked.start]:,} TPUv3-core-days")
    return f" ({', '.join(found)})" if found else ""


def _line(asked: Cell) -> dict[str, Any]:
    rule = asked.recipe.optimiser
    return {
        "name": asked.name,
        "table": asked.table,
        "model": asked.start.model,
        "pretrained_on": asked.start.corpus,
        "epochs": asked.start.epochs,
        "data": asked.data,
        "size": asked.recipe.data.size[0],
        "batch": asked.recipe.data.batch,
        "steps": round(asked.pictures / asked.recipe.data.batch),
        "rate": rule.rate,
        "rates": asked.source.rates if isinstance(asked.source, Task) else (rule.rate,),
        "weights": asked.weights,
        "published": [to_json(known._asdict()) for known in asked.published],
        "exaflops": round(asked.exaflops, 3),
        "exaflops_printed": TABLE_6[asked.start][1] if asked.task is None and asked.start in TABLE_6 else None,
        "tpu_core_days": TPU_CORE_DAYS.get(asked.start) if asked.task is None else None,
    }


def _listed(found: Sequence[str]) -> list[Table]:
    rows = []
    for name in found:
        asked = cell(name)
        known = f"{asked.published[0].value:.2f} ({asked.published[0].source})" if asked.published else "-"
        rows.append((name, f"{asked.recipe.optimiser.rate:g}", f"{asked.exaflops:,.4g}", known))
    return [Table(f"{len(rows)} recipes", ("recipe", "rate", "exaFLOPs", "published, %"), tuple(rows))]


def _all() -> list[Table]:
    """The recipes as the paper's tables have them: one of pre-trainings, and of transfers one a settings' table."""
    return [_pretrainings(), _transfers(), _large(), _vtab()]


def _pretrainings() -> Table:
    rows = []
    for name in (name for name in names() if cell(name).task is None):
        asked, rule = cell(name), cell(name).recipe.optimiser
        printed = f"{TABLE_6[asked.start][1]:,}" if asked.start in TABLE_6 else ""
        days = f"{TPU_CORE_DAYS[asked.start]:,}" if asked.start in TPU_CORE_DAYS else ""
        known = f"{asked.published[0].value:.2f}" if asked.published else ""
        corpus = asked.source
        assert isinstance(corpus, Corpus)
        decay = f"{corpus.weight_decay:g}"
        numbers = (f"{asked.exaflops:,.0f}", printed, days, known)
        rows.append((name, str(asked.start.epochs), f"{rule.rate:g}", decay, f"{corpus.dropout:g}", *numbers))
    headings = ("recipe", "epochs", "rate", "decay", "dropout", "exaFLOP", "printed", "TPU days", "top-1 %")
    return Table("Table 3: pre-training", headings, tuple(rows))


def _transfers() -> Table:
    rows = []
    for start in STARTS:
        columns = []
        for task in TASKS:
            found = transferred(start, "imagenet" if task == "real" else task)
            columns.append(next((f"{k.value:.2f}" for k in found if ("ReaL" in k.what) == (task == "real")), ""))
        if any(columns):
            rows.append((start_name(start), *columns))
    headings = ("recipe: finetune-MODEL-TASK", *TASKS)
    return Table("Table 4: fine-tuning; what Tables 5 and 6 and the README report, %", headings, tuple(rows))


def _large() -> Table:
    rows = []
    for start, values in TABLE_2.items():
        name = f"finetune-{start_name(start)}-imagenet-{LARGE[start.model]}"
        rows.append((name, f"{values[0]:.2f}", f"{values[1]:.2f}", f"{TPU_CORE_DAYS[start]:,}"))
    headings = ("recipe", "imagenet", "real", "TPU days")
    return Table("Table 2: ImageNet at 512 and 518 px with Polyak averaging, %", headings, tuple(rows))


def _vtab() -> Table:
    rows = [
        (task.replace("/", "-"), *(f"{TABLE_9[start][place]:.1f}" for start in TABLE_9))
        for place, task in enumerate(VTAB_TASKS)
    ]
    rows.append(("mean (Table 2)", *(f"{TABLE_2_VTAB[start]:.2f}" for start in TABLE_9)))
    headings = ("task: finetune-MODEL-TASK", *(start_name(start) for start in TABLE_9))
    return Table("Table 4, VTAB-1k: fine-tuning; what Table 9 reports, %", headings, tuple(rows))


def _markdown(table: Table) -> str:
    ruled = [table.headings, ("---", *("---:" for _ in table.headings[1:])), *table.rows]
    lines = []
    for place, row in enumerate(ruled):
        first = f"`{row[0]}`" if place > 1 and "(" not in row[0] else row[0]
        lines.append(f"| {' | '.join((first, *row[1:]))} |")
    return f"### {table.title}\n\n" + "\n".join(lines)


def _show(tables: Sequence[Table]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn

    console = Console()
    for table in tables:
        drawn = Drawn(title=table.title, box=box.SIMPLE_HEAD, padding=0, collapse_padding=True, title_justify="left")
        for place, heading in enumerate(table.headings):
            drawn.add_column(heading, justify="right" if place else "left", no_wrap=not place)
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
