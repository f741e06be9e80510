"""map.html: a data set as a plane of dots, a thumbnail for each under the pointer; one file that asks for nothing outside.

All thumbnails are one JPEG sheet, so a thousand pictures are one image element and less than the same pictures apart.
"""

import base64
import io
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vitrail.analysis.figures_inside import class_colours
from vitrail.core.runs import write_whole
from vitrail.core.types import Sample
from vitrail.data.decode import UnreadablePicture, decode
from vitrail.experiments.page import PAGE

SIDE = 72
"""Pixels of a thumbnail's longer side."""

BODY = """<style>
.map { position: relative; touch-action: none; }
.map canvas {
  display: block; width: 100%; aspect-ratio: 3 / 2; background: var(--pane); border-radius: 4px; cursor: crosshair;
}
.tip {
  position: absolute; pointer-events: none; display: none; width: 10rem; padding: .5rem; background: var(--paper);
  border: 1px solid var(--line); border-radius: 4px; font-size: .8rem; line-height: 1.3;
}
.tip i { display: block; width: 9rem; height: 9rem; background-repeat: no-repeat; image-rendering: pixelated; }
.legend {
  display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1rem 0; padding: 0; list-style: none; font-size: .85rem;
}
.legend b { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .35rem; }
.legend button { all: unset; cursor: pointer; } .legend button:focus-visible { outline: 2px solid var(--accent); }
.legend .off { opacity: .3; }
</style>
<p class="origin">@origin</p>
<h2 style="border:0;margin-top:.4rem;padding:0;font-size:1.6rem;font-weight:400">@heading</h2>
<p class="note">@caption</p>
<div class="map"><canvas aria-label="A dot a picture"></canvas><div class="tip"><i></i><span></span></div></div>
<ul class="legend"></ul>
<script>
const points = @points, classes = @classes, colours = @colours, columns = @columns, side = @side, sheet = "@sheet";
const box = document.querySelector(".map"), canvas = box.querySelector("canvas"), tip = box.querySelector(".tip");
const hidden = new Set();
let near = -1, scale = 1;
tip.querySelector("i").style.backgroundImage = `url(${sheet})`;
const place = p => [(0.03 + 0.94 * p[0]) * canvas.width, (0.97 - 0.94 * p[1]) * canvas.height];
const colour = label => colours[label] ?? "#76787b";
function paint() {
  scale = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * scale; canvas.height = canvas.clientHeight * scale;
  const pen = canvas.getContext("2d"), radius = Math.max(2.2, canvas.clientWidth / 300) * scale;
  points.forEach((p, index) => {
    if (hidden.has(p[2])) return;
    const [x, y] = place(p);
    pen.beginPath(); pen.arc(x, y, index === near ? 2.2 * radius : radius, 0, 7);
    pen.globalAlpha = index === near ? 1 : .8; pen.fillStyle = colour(p[2]); pen.fill();
  });
}
function look(event) {
  const frame = canvas.getBoundingClientRect();
  const x = (event.clientX - frame.left) * scale, y = (event.clientY - frame.top) * scale;
  let best = (30 * scale) ** 2, found = -1;
  points.forEach((p, index) => {
    if (hidden.has(p[2])) return;
    const [px, py] = place(p), far = (px - x) ** 2 + (py - y) ** 2;
    if (far < best) { best = far; found = index; }
  });
  if (found !== near) { near = found; paint(); }
  tip.style.display = found < 0 ? "none" : "block";
  if (found < 0) return;
  const [px, py] = place(points[found]).map(v => v / scale), picture = tip.querySelector("i");
  const zoom = picture.clientWidth / side;
  picture.style.backgroundSize = `${columns * side * zoom}px auto`;
  picture.style.backgroundPosition = `${-(found % columns) * side * zoom}px ${-Math.floor(found / columns) * side * zoom}px`;
  const name = points[found][3], label = classes[points[found][2]];
  tip.querySelector("span").textContent = label === undefined ? name : `${label} · ${name}`;
  tip.style.left = (px + 14 + tip.offsetWidth > frame.width ? Math.max(0, px - 14 - tip.offsetWidth) : px + 14) + "px";
  tip.style.top = Math.max(0, Math.min(py - tip.offsetHeight / 2, frame.height - tip.offsetHeight)) + "px";
}
box.addEventListener("pointermove", look);
box.addEventListener("pointerdown", look);
box.addEventListener("pointerleave", () => { near = -1; tip.style.display = "none"; paint(); });
addEventListener("resize", paint);
classes.forEach((name, label) => {
  if (!points.some(p => p[2] === label)) return;
  const item = document.createElement("li"), button = document.createElement("button"), dot = document.createElement("b");
  dot.style.background = colour(label); button.append(dot, name); item.append(button);
  button.setAttribute("aria-pressed", "true");
  button.onclick = () => {
    if (!hidden.delete(label)) hidden.add(label);
    item.classList.toggle("off", hidden.has(label)); button.setAttribute("aria-pressed", !hidden.has(label)); paint();
  };
  document.querySelector(".legend").append(item);
});
paint();
</script>"""


def write_map(
    path: Path,
    where: Float[np.ndarray, "n 2"],
    labels: Int[np.ndarray, "n"],
    classes: Sequence[str],
    samples: Sequence[Sample],
    title: str,
    caption: str,
) -> None:
    """where: each picture's place, in any unit. classes: names by label; pictures of label -1 have none."""
    low, span = where.min(0), np.maximum(np.ptp(where, axis=0), 1e-12)
    inside = (where - low) / span
    points = [
        [round(float(x), 4), round(float(y), 4), int(label), Path(sample.name).name]
        for (x, y), label, sample in zip(inside, labels, samples, strict=True)
    ]
    sheet, columns = _sheet(samples)
    values = {
        "origin": "a map of a data set",
        "heading": escape(title),
        "caption": escape(caption),
        "points": _script(points),
        "classes": _script(list(classes)),
        "colours": _script(class_colours(len(classes))),
        "columns": str(columns),
        "side": str(SIDE),
        "sheet": "data:image/jpeg;base64," + base64.b64encode(sheet).decode("ascii"),
    }
    # In one pass, so that what is put in is not looked through: a file name may hold "@side".
    body = re.sub(f"@({'|'.join(values)})", lambda mark: values[mark[1]], BODY)
    before, after = PAGE.replace("@title", escape(title).replace("@", "&#64;")).split("@body")
    raw = (before + body + after).encode("utf-8", "backslashreplace")
    write_whole(path, lambda part: _write(part, raw))


def _script(value: object) -> str:
    """JSON that can stand in a script element whatever names it holds."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _sheet(samples: Sequence[Sample]) -> tuple[bytes, int]:
    """All thumbnails, row by row, on one JPEG; and how many a row."""
    columns = max(1, min(len(samples), int(np.ceil(np.sqrt(len(samples))))))
    sheet = Image.new("RGB", (columns * SIDE, -(-len(samples) // columns) * SIDE), (118, 120, 123))
    for index, sample in enumerate(samples):
        try:
            picture = decode(sample.picture, 3, (SIDE, SIDE), sample.name)
        except UnreadablePicture:
            continue
        factor = SIDE / max(picture.size)
        size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
        small = picture.resize(size, Image.Resampling.BOX if factor < 1 else Image.Resampling.NEAREST)
        place = index % columns * SIDE + (SIDE - size[0]) // 2, index // columns * SIDE + (SIDE - size[1]) // 2
        sheet.paste(small, place)
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=80)
    return file.getvalue(), columns


def _write(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
