"""`vitrail demo`: what pre-training is worth, shown in three minutes."""

import sys

from vitrail.experiments.demo import Settings, demo


def run(settings: Settings) -> int:
    """The same model on the same pictures for the same steps, from random and from pre-trained weights."""
    return demo(settings, ["vitrail", *sys.argv[1:]])
