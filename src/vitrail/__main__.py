"""`python -m vitrail`, which torchrun needs."""

import sys

from vitrail.cli import main

sys.exit(main())
