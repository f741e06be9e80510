"""The test run checks every shape that a signature states.

The import hook and torch.compile do not mix, so tests marked `unhooked` run in a second pass: `VITRAIL_TEST_PASS=unhooked`.
So do a few that compute for long, for the checks make them half as long again.

Each test process computes on one thread: the models are tiny, and threads that wait for each other by spinning on cores
that another process holds make minutes of seconds.
"""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)

LONG = (
    *("test_readme.py", "test_engines.py", "test_export.py", "test_resume.py", "test_bad_input.py", "test_tour.py"),
    *("test_choosing.py", "test_models_compiled.py", "test_ranks.py", "test_predict_stream.py", "test_fit.py"),
    *("test_robustness.py", "test_bench_training.py", "test_examples.py", "test_deadline.py", "test_pretrain.py"),
    *("test_merging.py", "test_wheel.py", "test_bench_inference.py", "test_recipes_command.py", "test_loader.py"),
)
"""Files that take longest, longest first."""
UNHOOKED = os.environ.get("VITRAIL_TEST_PASS") == "unhooked"

if not UNHOOKED:
    from jaxtyping import install_import_hook

    install_import_hook("vitrail", "beartype.beartype")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """In the unhooked pass, files without such a test are not even imported."""
    other = UNHOOKED and collection_path.suffix == ".py" and "unhooked" not in collection_path.read_text("utf-8")
    return True if other else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if (item.get_closest_marker("unhooked") is not None) == UNHOOKED]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    # What takes long begins first, so that both processes have work to the end.
    place = {name: number for number, name in enumerate(LONG)}
    items[:] = sorted(kept, key=lambda item: place.get(item.path.name, len(LONG)))
