"""The test run checks every shape that a signature states.

The import hook and torch.compile do not mix, so tests marked `unhooked` run in a second pass: `VITRAIL_TEST_PASS=unhooked`.

Each test process computes on one thread: the models are tiny, and threads that wait for each other by spinning on cores
that another process holds make minutes of seconds.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)

LONG = ("test_readme.py", "test_wheel.py", "test_tour.py")
UNHOOKED = os.environ.get("VITRAIL_TEST_PASS") == "unhooked"

if not UNHOOKED:
    from jaxtyping import install_import_hook

    install_import_hook("vitrail", "beartype.beartype")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if (item.get_closest_marker("unhooked") is not None) == UNHOOKED]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    # What takes minutes in a single test begins first, so that the other process has work for as long.
    items[:] = sorted(kept, key=lambda item: item.path.name not in LONG)
