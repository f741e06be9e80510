"""The command line: a table of verbs, each imported when it is used. Nothing here imports torch."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import get_type_hints

VERBS = {
    "demo": ("vitrail.commands.demo:run", "what pre-training is worth, in three minutes"),
    "fit": ("vitrail.commands.fit:run", "an answer within a minute for anyone's photos, then a better one"),
    "train": ("vitrail.commands.train:train", "train a model from random weights on your pictures"),
    "finetune": ("vitrail.commands.train:finetune", "train on from a checkpoint, on your pictures and classes"),
    "pretrain": (
        "vitrail.commands.pretrain:pretrain",
        "learn from pictures without labels, by masked patch prediction",
    ),
    "run": ("vitrail.commands.train:run_file", "carry out a recipe of the paper by name, or your own Python file"),
    "recipes": ("vitrail.commands.recipes:run", "the paper's training tables as named recipes, with published results"),
    "recipe": (
        "vitrail.commands.recipes:run_one",
        "all of one recipe: settings, cost, published results, open questions",
    ),
    "pack": (
        "vitrail.commands.pack:run",
        "pictures shrunk once, read without decoding: the same data, several times as fast",
    ),
    "predict": ("vitrail.commands.predict:run", "what a model sees in pictures"),
    "evaluate": ("vitrail.commands.evaluate:run", "how often a model is right on labelled pictures"),
    "probe": ("vitrail.commands.probe:run", "how much a frozen model already knows: few-shot, linear, kNN"),
    "vtab": ("vitrail.commands.vtab:run", "VTAB-1k: which tasks are here, and how a model does on them"),
    "explain": ("vitrail.commands.explain:run", "one picture's way through a model, step by step"),
    "figures": ("vitrail.commands.figures:run", "filters, positions, attention, tokens: a look inside"),
    "robustness": (
        "vitrail.commands.robustness:run",
        "what dropped, shuffled, corrupted pictures do to a model, or to two",
    ),
    "weights": ("vitrail.commands.weights:run", "what a checkpoint is, and what loading does to it"),
    "export": (
        "vitrail.commands.export:run",
        "a model as OpenVINO, ONNX or torch.export file, compared on real pictures",
    ),
    "convert": ("vitrail.commands.convert:run", "a checkpoint for another library, compared before it is trusted"),
    "verify": ("vitrail.commands.verify:run", "a checkpoint's certificate; or how far two of them differ"),
    "models": ("vitrail.commands.models:run", "the models by name, with their costs; --remote: published weights"),
    "bench": ("vitrail.commands.bench:run", "measure this machine: bench inference, training, data"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb. Exit codes: 0, what the verb says, or 2 after one sentence on what a person has to mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"vitrail {version('vitrail')}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.0)[0]
        return _refuse(f"{verb!r} is not a verb of vitrail; the nearest is {near!r} (vitrail --help lists all).")
    from vitrail.core.errors import UserError

    try:
        return _call(verb, rest)
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; what is left must not be written into the broken pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _call(verb: str, rest: list[str]) -> int:
    module, name = VERBS[verb][0].split(":")
    function = getattr(importlib.import_module(module), name)
    kind = next(iter(get_type_hints(function).values()))
    if kind == list[str]:
        return int(function(rest))
    from vitrail.commands.flags import parse

    said = kind.__doc__ or ""
    if said.startswith(f"{kind.__name__}("):  # a dataclass without a docstring is given its signature
        said = function.__doc__ or ""
    return int(function(parse(kind, rest, verb, description=said.strip())))


def _help() -> str:
    verbs = "\n".join(f"  {verb:<10} {line}" for verb, (_, line) in VERBS.items())
    return (
        "usage: vitrail VERB [...]\n\nVision Transformers from your pictures, and a look inside.\n\n"
        f"{verbs}\n\nvitrail VERB --help lists a verb's flags; vitrail --version says which this is."
    )


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
