"""`vitrail verify FILE [--against FILE2]`: a certificate of what a checkpoint is and computes, as one page or as JSON."""

import hashlib
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

import tyro
from torch import Tensor

from vitrail.analysis.agreement import TOLERANCE, Difference, Model, differences, layers_of, reference_picture
from vitrail.commands.convert import same_bits
from vitrail.core.errors import UserError
from vitrail.core.runs import write_whole
from vitrail.core.values import to_json
from vitrail.experiments.page import PAGE
from vitrail.models.classifier import Classifier
from vitrail.weights.load import Given, build, headless, locate, read
from vitrail.weights.report import LoadReport, described_numerics, described_preprocess, page, terminal_width
from vitrail.weights.source import Checkpoint, open_checkpoint

RECORDED = ("logits", "embeds", "pooled", "features")
"""What a library's recorded outputs may be called, in an .npz beside its input `images_nchw` or `images_nhwc`."""


@dataclass(frozen=True)
class Settings:
    """A checkpoint's certificate: what it is, and what it computes on a fixed picture; or how far two files differ."""

    file: tyro.conf.Positional[str]
    """A file or folder, or an id: hf:OWNER/NAME, official:FOLDER/NAME, timm:NAME."""
    against: str = ""
    """Another of these to compare with, layer by layer; or an .npz of images_nchw and a library's outputs for them."""
    heads: int | None = None
    """Attention heads, for files that cannot say."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the position table, for files that cannot say."""
    html: Path | None = None
    """Write the page there too."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Comparison:
    """bits: every tensor is the same to the bit (None: only outputs are known). said: what the two state differently."""

    path: str
    sha256: str
    differences: tuple[Difference, ...]
    bits: bool | None
    said: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return all(difference.equal for difference in self.differences)

    @property
    def verdict(self) -> str:
        weights = {True: "; the same bits in every tensor", False: "; the tensors differ in name or bits", None: ""}[
            self.bits
        ]
        if not self.equal:
            first = next(one for one in self.differences if not one.equal)
            return (
                f"DIFFERENT, from {first.layer} on: by {first.relative:.1e} of its largest value, where {TOLERANCE:g} is "
                f"allowed{weights}"
            )
        worst = max(one.relative for one in self.differences)
        return f"equal: {f'within {worst:.1e} of each largest value' if worst else 'the same numbers out'}{weights}"


@dataclass(frozen=True)
class Certificate:
    """picture: sha256 of the fixed picture's bytes. top: (class, number) of the likeliest classes. first: numbers that
    come out first. means: mean and deviation of each layer."""

    report: LoadReport
    picture: str
    top: tuple[tuple[str, float], ...]
    first: tuple[float, ...]
    means: tuple[tuple[str, float, float], ...]
    against: Comparison | None = None


def run(settings: Settings) -> int:
    """0; 1 where the two files compute something else. Raises UserError where one cannot be read or compared."""
    given = read(settings.file, heads=settings.heads, grid=settings.grid)
    model = build(given)
    preprocess = model.preprocess
    picture = reference_picture(preprocess.size, preprocess.channels)
    images = preprocess.normalize(picture[None])
    layers = layers_of(model, images)
    against = _against(settings, given, model, images, layers) if settings.against else None
    certificate = Certificate(
        given.report,
        hashlib.sha256(picture.numpy().tobytes()).hexdigest(),
        _top(model, layers),
        tuple(round(float(value), 6) for value in list(layers.values())[-1].flatten()[:8]),
        tuple((name, float(x.double().mean()), float(x.double().std())) for name, x in layers.items()),
        against,
    )
    if settings.html is not None:
        text = html(certificate)
        write_whole(settings.html, lambda part: part.write_text(text, encoding="utf-8"))
    if settings.json:
        data = {**to_json(certificate), "report": certificate.report.as_json()}
        if against is not None:
            data["against"] |= {"equal": against.equal, "verdict": against.verdict}
        print(json.dumps(data, indent=1, ensure_ascii=False))
    else:
        print(page(lines(certificate), terminal_width()))
    return 0 if against is None or against.equal else 1


def _top(model: Model, layers: dict[str, Tensor]) -> tuple[tuple[str, float], ...]:
    if "logits" not in layers or not isinstance(model, Classifier):
        return ()
    best = layers["logits"][0].float().topk(min(5, layers["logits"].shape[1]))
    labels = model.labels or tuple(f"class {number}" for number in range(model.config.classes))
    return tuple((labels[i], value) for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True))


def _against(settings: Settings, given: Given, model: Model, images: Tensor, layers: dict[str, Tensor]) -> Comparison:
    """With a library's recorded outputs, or with another checkpoint on the same input."""
    place = locate(settings.against)
    recorded = open_checkpoint(place)
    if any(name.startswith("images_n") for name in recorded.names):
        return _recorded(recorded, model)
    other = read(place, heads=settings.heads, grid=settings.grid)
    configs = given.backbone, other.backbone
    if len({(type(config), config.width, config.depth, config.stride) for config in configs}) > 1:
        raise UserError(
            f"{settings.file} and {place} are different models and cannot be compared: {given.report.architecture}, and "
            f"{other.report.architecture}"
        )
    one, theirs = (given, other) if isinstance(model, Classifier) else (headless(given), headless(other))
    found = differences(layers, layers_of(build(theirs), images))
    return Comparison(str(place), other.report.sha256, found, same_bits(one, theirs), _said(given.report, other.report))


def _recorded(recorded: Checkpoint, model: Model) -> Comparison:
    layout = next(name for name in recorded.names if name.startswith("images_n"))
    images = recorded.read(layout).float()
    images = images.permute(0, 3, 1, 2).contiguous() if layout == "images_nhwc" else images
    ours = layers_of(model, images)
    name = next((name for name in ("logits", "embedding") if name in ours), "")
    theirs: dict[str, Tensor] = {}
    for key in RECORDED:
        if key in recorded and (key == "features" or name):
            theirs["features" if key == "features" else name] = recorded.read(key)
    if not theirs:
        raise UserError(f"{recorded.path} holds an input and none of {', '.join(RECORDED)}: record one of them too")
    said = ("its outputs were recorded by another library",)
    return Comparison(str(recorded.path), recorded.sha256(), differences(ours, theirs), None, said)


def _said(ours: LoadReport, theirs: LoadReport) -> tuple[str, ...]:
    said = []
    if ours.preprocess != theirs.preprocess:
        said.append(
            f"preprocessing: {described_preprocess(theirs.preprocess)} ({theirs.preprocess_source}) in the second file"
        )
    if ours.numerics != theirs.numerics and theirs.numerics is not None:
        said.append(f"numerics: {described_numerics(theirs.numerics)} in the second file")
    if ours.labels != theirs.labels:
        said.append(f"class names: {ours.labels} in the first file, {theirs.labels} in the second")
    return tuple(said)


def lines(certificate: Certificate) -> list[tuple[str, str]]:
    """(what, words) for people."""
    found = list(certificate.report.lines())
    found.append(
        ("picture", f"fixed, {' x '.join(map(str, certificate.report.preprocess.size))}, sha256 {certificate.picture}")
    )
    for number, (name, value) in enumerate(certificate.top):
        found.append(("top logits" if number == 0 else "", f"{value:+.6f}  {name}"))
    found.append(("first numbers", " ".join(f"{value:+.6f}" for value in certificate.first)))
    if certificate.against is None:
        return found
    against = certificate.against
    found += [("", ""), ("against", against.path), ("sha256", against.sha256)]
    found.append(("layer", f"{'largest difference':<20}largest value"))
    for one in against.differences:
        found.append((one.layer, f"{one.difference or 0:<20.3g}{one.largest:.4g}"))
    found += [("stated", words) for words in against.said]
    return [*found, ("verdict", against.verdict)]


def html(certificate: Certificate) -> str:
    """One page that stands alone."""
    report, against = certificate.report, certificate.against
    facts = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(words)}</dd></div>"
        for what, words in report.lines()
        if what != "file"
    )
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{mean:+.6f}</td><td>{deviation:.6f}</td></tr>"
        for name, mean, deviation in certificate.means
    )
    top = "".join(f"<tr><td>{escape(name)}</td><td>{value:+.6f}</td></tr>" for name, value in certificate.top)
    body = [
        f'<p class="origin">Certificate</p><h1 style="font-size:2.2rem">{escape(Path(report.path).name)}</h1>',
        f'<p class="lead">{escape(against.verdict if against else report.architecture)}</p>',
        f'<section><h2>What it is</h2><dl class="facts" style="columns:1">{facts}</dl></section>',
        "<section><h2>What it computes on the fixed picture</h2>"
        f'<p class="note">The picture&#39;s sha256: {certificate.picture}. The first numbers that come out: '
        f"{' '.join(f'{value:+.6f}' for value in certificate.first)}</p>",
        f'<div class="scroll"><table><tr><th>class</th><th>logit</th></tr>{top}</table></div>' if top else "",
        f'<div class="scroll"><table><tr><th>layer</th><th>mean</th><th>deviation</th></tr>{rows}</table></div></section>',
    ]
    if against is not None:
        compared = "".join(
            f"<tr><td>{escape(one.layer)}</td><td>{one.difference:.3e}</td><td>{one.largest:.4g}</td></tr>"
            for one in against.differences
        )
        said = "".join(f'<p class="note">{escape(words)}</p>' for words in against.said)
        body.append(
            f'<section><h2>Against {escape(Path(against.path).name)}</h2><p class="note">sha256 {against.sha256}</p>{said}'
            '<div class="scroll"><table><tr><th>layer</th><th>largest difference</th><th>largest value</th></tr>'
            f"{compared}</table></div></section>"
        )
    return PAGE.replace("@title", f"Certificate: {escape(Path(report.path).name)}").replace("@body", "\n".join(body))
