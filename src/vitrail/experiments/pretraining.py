"""What a run of masked patch prediction says of itself: measured while it trains, at its end, and in pictures."""

import base64
import io
from contextlib import suppress
from html import escape

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from vitrail.core.device import Precision
from vitrail.core.types import Preprocess, Row, Source
from vitrail.data.decode import UnreadablePicture
from vitrail.data.loader import PictureLoader
from vitrail.data.transforms import Transform
from vitrail.evaluation import masked
from vitrail.evaluation.masked import Guessed
from vitrail.experiments.recipe import Recipe
from vitrail.models.masked import MaskedPatchPredictor
from vitrail.objectives.masked import Corruption, painted, patches_at
from vitrail.training.pace import Evaluate

SHOWN = 12
"""Pictures in the report."""


def measure(
    recipe: Recipe, device: torch.device, model: nn.Module, loader: PictureLoader, precision: Precision
) -> Guessed:
    """Every picture of the loader once, over all processes, on the corruption that is always the same."""
    assert isinstance(model, MaskedPatchPredictor)
    return masked.measure(model, loader, recipe.objective.corrupt, device=device, precision=precision)


def evaluator(recipe: Recipe, device: torch.device, held_out: PictureLoader) -> Evaluate:
    """The best weights are those that name the colour of most hidden patches, whatever is predicted of them."""

    def validate(model: nn.Module) -> list[Row]:
        assert recipe.run.precision != "planned"
        found = measure(recipe, device, model, held_out, recipe.run.precision)
        return [Row("validation/accuracy", 100 * found.accuracy), Row("validation/loss", found.mean_loss, unit="")]

    return validate


def unit(recipe: Recipe) -> str:
    """Of the loss."""
    return "" if recipe.objective.targets == "pixels" else "nats"


def pictures(recipe: Recipe, device: torch.device, model: nn.Module, source: Source, preprocess: Preprocess) -> str:
    """HTML: some pictures of the source beside what the model was given of them and what it made of that.

    Hidden patches are grey where the mask's embedding stood, and where another patch's did they show that one.
    """
    assert isinstance(model, MaskedPatchPredictor)
    transform, index, names, pixels = Transform(preprocess), [], [], []
    for place in np.linspace(0, len(source) - 1, min(SHOWN, len(source)), dtype=int).tolist():
        sample = source[place]
        with suppress(UnreadablePicture):
            pixels.append(torch.from_numpy(transform(sample.picture, None, sample.name)))
            index.append(place)
            names.append(sample.name)
    if not pixels:
        return ""
    model.eval()
    shown, places = torch.stack(pixels).to(device), torch.tensor(index, device=device)
    with torch.inference_mode():
        corruption, predicted = masked.predict(model, shown, places, recipe.objective.corrupt, "fp32")
        made = painted(model.config, preprocess, predicted)
    given, answered = _put_together(shown, model.config.backbone.stride, corruption, made)
    rows = [
        f'<figure title="{escape(name)}"><div class="triple">'
        + "".join(_image(picture[row], what, name) for picture, what in _kinds(shown.float() / 255, given, answered))
        + "</div></figure>"
        for row, name in enumerate(names)
    ]
    note = (
        "Each picture, what the model was given of it (grey patches are hidden, and some show another place of the "
        "picture), and its prediction at every corrupted patch, put in place."
    )
    return f'<p class="note">{note}</p><div class="triples">{"".join(rows)}</div>'


Pictures = Float[Tensor, "b c h w"]


def _kinds(original: Pictures, given: Pictures, answered: Pictures) -> list[tuple[Pictures, str]]:
    return [(original, "original"), (given, "given"), (answered, "predicted")]


def _put_together(
    pixels: Tensor, patch: tuple[int, int], corruption: Corruption, made: Float[Tensor, "b m c ph pw"]
) -> tuple[Pictures, Pictures]:
    """In [0, 1]: the pictures as they were given, and with every prediction in its place."""
    sources, across = corruption.sources, pixels.shape[3] // patch[1]
    moved = patches_at(pixels, patch, sources.clamp(min=0)).float() / 255
    given = torch.where(sources[..., None, None, None] < 0, 0.5, moved)
    own = torch.arange(sources.shape[1], device=pixels.device).expand(sources.shape)
    answered = patches_at(pixels, patch, own).float() / 255
    answered = answered.scatter(1, corruption.places[..., None, None, None].expand(made.shape), made)

    def joined(patches: Tensor) -> Tensor:
        return patches.unflatten(1, (-1, across)).permute(0, 3, 1, 4, 2, 5).reshape(pixels.shape).cpu()

    return joined(given), joined(answered)


def _image(picture: Float[Tensor, "c h w"], what: str, name: str) -> str:
    """An <img> of it. Of channels that are no colours, the first is shown."""
    values = (picture.cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy().transpose(1, 2, 0)
    values = values if values.shape[2] in (3, 4) else values[:, :, 0]
    small = max(values.shape[:2]) <= 96
    file = io.BytesIO()
    image = Image.fromarray(values)
    if small:
        image.save(file, "PNG", optimize=True)
    else:
        image.convert("RGB").save(file, "JPEG", quality=85)
    raw = base64.b64encode(file.getvalue()).decode()
    look = ' class="pixelated"' if small else ""
    return f'<img src="data:image/{"png" if small else "jpeg"};base64,{raw}" alt="{escape(name)}, {what}"{look}>'
