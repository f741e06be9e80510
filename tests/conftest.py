"""The test run checks every shape that a signature states.

The import hook and torch.compile do not mix, so tests marked `unhooked` run in a second pass: `VITRAIL_TEST_PASS=unhooked`.
"""

import os

import pytest

UNHOOKED = os.environ.get("VITRAIL_TEST_PASS") == "unhooked"

if not UNHOOKED:
    from jaxtyping import install_import_hook

    install_import_hook("vitrail", "beartype.beartype")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if (item.get_closest_marker("unhooked") is not None) == UNHOOKED]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
