"""`vitrail fit PHOTOS`: an answer within a minute, a better one by the minute."""

import sys

from vitrail.commands.flags import given
from vitrail.experiments.photos import Settings, fit_photos


def run(settings: Settings) -> int:
    """A model of your photos, and what to mend in them. Ctrl-C at any time keeps the best so far, with exit code 130."""
    return fit_photos(settings, ["vitrail", *sys.argv[1:]], given(sys.argv[1:]))
