import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.analysis.figures import as_svg, confusion, curves, reliability, save
from vitrail.evaluation.metrics import Bin


def lines(steps: int = 200) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        found.append({"step": step, "epoch": step / 20, "loss": 2 / step + 0.3, "rate": 1e-3 / step})
        if step % 20 == 0:
            found.append(
                {"step": step, "epoch": step / 20, "validation/accuracy": 60 + step / 10, "validation/loss": 1.0}
            )
    return found


def test_curves_show_what_was_measured() -> None:
    losses, accuracies, rates = curves(lines()).axes
    raw = losses.lines[0]
    np.testing.assert_allclose(raw.get_ydata(), [2 / step + 0.3 for step in range(1, 201)])
    assert list(accuracies.lines[0].get_xdata()) == list(range(20, 201, 20))
    assert accuracies.lines[0].get_ydata()[-1] == 80
    assert [text.get_text() for text in accuracies.texts] == ["80.00"]
    assert rates.lines[0].get_ydata()[0] == 1e-3
    assert [axis.get_title(loc="left") for axis in (losses, accuracies, rates)] == [
        "loss (nats)",
        "validation accuracy (%)",
        "learning rate",
    ]
    assert "10 epochs" in losses.get_xlabel()


def test_the_smooth_curve_keeps_a_straight_line_straight() -> None:
    metrics = [{"step": step, "loss": 5.0, "rate": 1.0} for step in range(1, 201)]
    smooth = curves(metrics).axes[0].lines[1]
    np.testing.assert_allclose(smooth.get_ydata(), 5.0)


@pytest.mark.parametrize("metrics", [[], lines(1), [{"step": 5, "epoch": 0.1, "validation/accuracy": 12.0}]])
def test_curves_of_hardly_anything(metrics: list[dict[str, float]], tmp_path: Path) -> None:
    curves(metrics, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (2200, 620)


def test_png_is_transparent_whatever_the_name(tmp_path: Path) -> None:
    save(curves(lines()), tmp_path / "curves.png.part")
    with Image.open(tmp_path / "curves.png.part") as image:
        assert image.format == "PNG"
        assert image.convert("RGBA").getpixel((0, 0))[3] == 0


def contrast(one: str, other: str) -> float:
    """WCAG 2.1, relative luminance and contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_ink_reads_on_white_and_on_black() -> None:
    from vitrail.analysis.figures import INK

    assert contrast(INK, "#ffffff") > 4.4
    assert contrast(INK, "#000000") > 4.4


def test_svg_is_one_element_with_the_pages_colours_and_its_own_text() -> None:
    names = ("<cat> & $x$", "犬", "a" * 50)
    svg = as_svg(confusion(np.array([[5, 0, 1], [0, 2, 0], [0, 0, 0]]), names), 'a "title" <b>')
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert root.get("aria-label") == 'a "title" <b>'
    assert root.get("width") is None
    assert "currentColor" in svg
    assert "DejaVu" not in svg
    said = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"<cat> & $x$", "犬", "a" * 19 + "…", "5", "1", "2", "true", "predicted"} <= set(said)
    # The same figure is the same text; nothing depends on the day.
    again = as_svg(confusion(np.array([[5, 0, 1], [0, 2, 0], [0, 0, 0]]), names), 'a "title" <b>')
    assert svg == again
    assert not re.search(r'(href|src)="(?!#|data:)', svg)


@pytest.mark.parametrize("size", [2, 30, 120])
def test_confusion_matrices_of_many_classes(size: int) -> None:
    figure = confusion(np.eye(size, dtype=np.int64), [f"class {i}" for i in range(size)])
    axis = figure.axes[0]
    assert len(axis.texts) == (size if size <= 20 else 0)
    assert len(axis.get_xticklabels()) == size if size <= 60 else True
    assert axis.images[0].get_array()[..., 3].sum() == size


def test_reliability_draws_only_bins_with_pictures() -> None:
    bins = [Bin(0.0, 0.5, 0, None, None), Bin(0.5, 1.0, 8, 0.75, 0.25)]
    upper, lower = reliability(bins).axes
    assert [(p.get_x(), p.get_width(), p.get_height()) for p in upper.patches] == [(50, 50, 25)]
    assert [p.get_height() for p in lower.patches] == [8]


def test_no_global_state_of_matplotlib_is_touched() -> None:
    # Read as a plain dict: asking rcParams for its backend imports pyplot.
    code = (
        "import sys, matplotlib, numpy as np\n"
        "state = lambda: {name: dict.__getitem__(matplotlib.rcParams, name) for name in matplotlib.rcParams}\n"
        "before = state()\n"
        "from vitrail.analysis.figures import as_svg, confusion\n"
        "as_svg(confusion(np.eye(2, dtype=np.int64), ['a', 'b']), 't')\n"
        "assert state() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
