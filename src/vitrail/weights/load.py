"""The one way in: any checkpoint that is known, to a model that computes what its own library computes.

What a file does not say is never guessed in silence: it stands in the model's `report`. A head that is absent or all
zeros is no head, so `load` refuses it and `load_backbone` takes the rest.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.models.classifier import Classifier, ClassifierConfig, resize_classifier
from vitrail.models.resnet import ResNet, ResNetConfig, TrunkConfig
from vitrail.models.vit import ViT, ViTConfig, resize_backbone
from vitrail.weights import labels, own, zoo
from vitrail.weights.conversion import Config, Converted, Model
from vitrail.weights.formats import identify
from vitrail.weights.options import Options
from vitrail.weights.preprocessing import changed
from vitrail.weights.report import LoadReport
from vitrail.weights.source import Checkpoint, open_checkpoint

IMAGENET_HEADS = ("official", "big_vision", "bit", "timm", "torchvision", "torch_hub")
"""Formats that name no classes, and whose public heads of 1000 and 21,843 classes are all in ImageNet's order."""

TABLES = ("learned", "learned2d", "relative")
"""Positions that are resampled."""


def load(
    source: str | Path,
    *,
    heads: int | None = None,
    grid: tuple[int, int] | None = None,
    image: tuple[int, int] | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
    preprocess: Preprocess | str | None = None,
) -> Classifier:
    """A classifier (or a tower with its embedding), ready to use in evaluation mode, with its LoadReport as `report`.

    source: a file or a folder in any known format, or an id: "hf:google/vit-base-patch16-224",
        "official:imagenet21k/ViT-B_16", "timm:vit_small_patch16_224.augreg_in21k".
    heads, grid: attention heads and (rows, columns) of the position table, for files that cannot say.
    image: (height, width) to work at from now on; the position grid is resampled by the model's own rule.
    dropout, drop_path: other chances than the checkpoint was trained with.
    preprocess: in place of what the file states, or of what was assumed; or the changes to it, in words such as
        "imagenet,bicubic,resize=256,size=224".
    Raises UserError for what is missing, damaged, foreign, incomplete or without a usable head.
    """
    options = Options(heads, grid, image, dropout, drop_path, preprocess)
    given = read(source, heads=heads, grid=grid)
    where = given.checkpoint.path
    if given.converted.head != "usable":
        what = "no head" if given.converted.head == "absent" else "a head of zeros alone, as it was before fine-tuning"
        raise UserError(f"{where} has {what}, so it cannot classify: load it with load_backbone, or finetune it")
    model = _finish(given, options)
    assert isinstance(model, Classifier)
    return model


def load_any(
    source: str | Path,
    *,
    heads: int | None = None,
    grid: tuple[int, int] | None = None,
    image: tuple[int, int] | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
    preprocess: Preprocess | str | None = None,
) -> Model:
    """All that a checkpoint holds: a classifier, be its head all zeros, or a backbone; to train on from. Else as `load`."""
    options = Options(heads, grid, image, dropout, drop_path, preprocess)
    return _finish(read(source, heads=heads, grid=grid), options)


def load_backbone(
    source: str | Path,
    *,
    heads: int | None = None,
    grid: tuple[int, int] | None = None,
    image: tuple[int, int] | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
    preprocess: Preprocess | str | None = None,
) -> ViT | ResNet:
    """What stands under the head, of any known checkpoint, whatever its head; all else as `load`."""
    options = Options(heads, grid, image, dropout, drop_path, preprocess)
    model = _finish(headless(read(source, heads=heads, grid=grid)), options)
    assert not isinstance(model, Classifier)
    return model


def inspect(source: str | Path, *, heads: int | None = None, grid: tuple[int, int] | None = None) -> LoadReport:
    """The report alone: every tensor is read and checked, no model is built."""
    return read(source, heads=heads, grid=grid).report


@dataclass
class Given:
    """A checkpoint that was read whole, checked against its own config, and not yet built."""

    checkpoint: Checkpoint
    converted: Converted
    report: LoadReport

    @property
    def backbone(self) -> ViTConfig | ResNetConfig:
        config = self.converted.config
        return config.backbone if isinstance(config, ClassifierConfig) else config


def read(source: str | Path, *, heads: int | None = None, grid: tuple[int, int] | None = None) -> Given:
    """Every tensor in Vitrail's names, each finite and of the shape that the config asks for; the report with it."""
    checkpoint = open_checkpoint(locate(source))
    format = identify(checkpoint)
    converted = _named(format.convert(checkpoint, heads=heads, grid=grid), format.NAME)
    # A person's own file keeps the precision that it was saved in; ours are in bf16 for room alone.
    if format.NAME != "vitrail" or str(source).startswith("vitrail:"):
        converted = replace(converted, tensors={name: _single(tensor) for name, tensor in converted.tensors.items()})
    _check(checkpoint, converted)
    config = converted.config
    backbone = config.backbone if isinstance(config, ClassifierConfig) else config
    report = LoadReport(
        path=str(checkpoint.path),
        format=format.NAME,
        architecture=described(config),
        preprocess=converted.preprocess,
        preprocess_source=converted.preprocess_source,
        numerics=getattr(backbone, "numerics", None),
        loaded=len(converted.renamed),
        renamed=tuple(converted.renamed.items()),
        resampled=(),
        folded=converted.folded,
        left_out=tuple(converted.left_out.items()),
        head=converted.head,
        classes=config.classes if isinstance(config, ClassifierConfig) else None,
        labels=len(converted.labels),
        dtypes=_dtypes(checkpoint, converted),
        files=checkpoint.files,
        modified=checkpoint.modified,
        notes=converted.notes,
    )
    return Given(checkpoint, converted, report)


def locate(source: str | Path) -> Path:
    """A path as it is; an id's file, fetched where it is not in the cache. Raises UserError for what is neither."""
    if not isinstance(source, str | Path) or not str(source):
        raise UserError(f"{source!r} is no checkpoint: give a path, or an id such as hf:owner/name")
    if str(source).startswith("vitrail:") and not Path(source).exists():
        return own.place(str(source))
    if str(source).startswith(("hf:", "official:", "timm:")) and not Path(source).exists():
        from vitrail.weights.remote import fetch

        return fetch(str(source))
    return Path(source)


def build(given: Given, dropout: float | None = None, drop_path: float | None = None) -> Model:
    """The model around the tensors, whatever its head; in evaluation mode."""
    config = _with_chances(given.converted.config, dropout, drop_path)
    model: Model = config.build(device="meta")
    model.load_state_dict(given.converted.tensors, assign=True)
    if isinstance(model, Classifier):
        model.labels = given.converted.labels
    model.preprocess = given.converted.preprocess
    return _finished(model, given.report).eval()


def headless(given: Given) -> Given:
    """Without pool and head, for a classifier's file."""
    config = given.converted.config
    if not isinstance(config, ClassifierConfig):
        return given
    under = "backbone."
    tensors = {k.removeprefix(under): t for k, t in given.converted.tensors.items() if k.startswith(under)}
    renamed = {k: name for k, name in given.converted.renamed.items() if name.startswith(under)}
    left = {k: "not asked for: the backbone alone" for k in given.converted.renamed if k not in renamed}
    renamed = {k: name.removeprefix(under) for k, name in renamed.items()}
    converted = replace(given.converted, config=config.backbone, tensors=tensors, renamed=renamed, labels=())
    report = replace(
        given.report,
        architecture=described(config.backbone),
        loaded=len(renamed),
        renamed=tuple(renamed.items()),
        left_out=(*given.report.left_out, *left.items()),
    )
    return Given(given.checkpoint, converted, report)


def described(config: Config) -> str:
    """A config in one line."""
    backbone = config.backbone if isinstance(config, ClassifierConfig) else config
    words = [_described_vit(backbone) if isinstance(backbone, ViTConfig) else _described_resnet(backbone)]
    if isinstance(config, ClassifierConfig):
        words.append(f"{config.pool} pool" + (f", tanh layer of {config.hidden}" if config.hidden else ""))
    words.append(f"{config.parameters():,} parameters")
    return "; ".join(words)


def _described_vit(config: ViTConfig) -> str:
    sizes = zoo.Variant(config.width, config.depth, config.mlp, config.heads)
    variant = next((name for name, row in zoo.VARIANTS.items() if row == sizes), None)
    patch = f"{config.patch[0]}" if config.patch[0] == config.patch[1] else f"{config.patch[0]}x{config.patch[1]}"
    name = f"ViT-{variant}/{patch}" if variant else f"ViT with patches of {patch}"
    default = ViTConfig(**sizes._asdict(), patch=config.patch, image=config.image)
    quiet = {*zoo.Variant._fields, "patch", "image", "numerics", "dropout", "drop_path", "positions", "class_token"}
    own = [
        _described_field(field.replace("_", " "), getattr(config, field))
        for field in ViTConfig.__dataclass_fields__
        if field not in quiet and getattr(config, field) != getattr(default, field)
    ]
    own.insert(0, f"{config.positions} positions on {config.grid[0]} x {config.grid[1]}")
    own.insert(0, "class token" if config.class_token else "no class token")
    return (
        f"{name} for {config.image[0]} x {config.image[1]}: width {config.width}, {config.depth} blocks, "
        f"{config.heads} heads, MLP {config.mlp}, {', '.join(own)}"
    )


def _described_field(name: str, value: object) -> str:
    if isinstance(value, TrunkConfig):
        units = f"trunk of {', '.join(map(str, value.layers))} units" if value.layers else "root"
        return f"on a ResNet {units}"
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {value}"


def _described_resnet(config: ResNetConfig) -> str:
    depth = 3 * sum(config.layers) + 2
    return f"BiT-R{depth}x{config.width_factor}: units {', '.join(map(str, config.layers))}, width {config.width}"


def _with_chances(config: Config, dropout: float | None, drop_path: float | None) -> Config:
    if isinstance(config, ClassifierConfig):
        backbone = _with_chances(config.backbone, dropout, drop_path)
        assert not isinstance(backbone, ClassifierConfig)
        return replace(config, backbone=backbone)
    if isinstance(config, ResNetConfig):
        return config  # it has neither
    return replace(
        config,
        dropout=config.dropout if dropout is None else dropout,
        drop_path=config.drop_path if drop_path is None else drop_path,
    )


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _named(converted: Converted, format: str) -> Converted:
    """ImageNet's names for heads that can have no other meaning; said in the notes."""
    config = converted.config
    if not isinstance(config, ClassifierConfig) or config.output == "embedding":
        return converted
    known = {labels.IMAGENET_1K: ("1k", labels.imagenet1k), labels.IMAGENET_21K: ("21k", labels.imagenet21k)}
    if converted.labels or format not in IMAGENET_HEADS or config.classes not in known:
        return converted
    name, names = known[config.classes]
    note = (
        f"the file names no classes; its {config.classes:,} are taken to be ImageNet-{name}'s, in the order of its public "
        "heads"
    )
    return replace(converted, labels=names(), notes=(*converted.notes, note))


def _check(checkpoint: Checkpoint, converted: Converted) -> None:
    """The tensors must be the model's exactly, by name and shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in converted.config.build(device="meta").state_dict().items()}
    theirs: dict[str, list[str]] = {}
    for name, ours in converted.renamed.items():
        theirs.setdefault(ours, []).append(name)
    for what, names in (
        ("lacks what becomes", wanted.keys() - converted.tensors.keys()),
        ("holds the unknown", converted.tensors.keys() - wanted.keys()),
    ):
        if names:
            some = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise UserError(f"{checkpoint.path} {what} {some}, against its own architecture: use another checkpoint")
    for name, shape in wanted.items():
        found = tuple(converted.tensors[name].shape)
        if found != shape:
            key = " and ".join(theirs.get(name, [name])[:3])
            raise UserError(
                f"{checkpoint.path} holds {key} of shape {found}, where its other tensors ask for {shape}: "
                "use another checkpoint"
            )


def _dtypes(checkpoint: Checkpoint, converted: Converted) -> tuple[str, ...]:
    before = dict.fromkeys(checkpoint.dtype(name) for name in converted.renamed)
    after = {str(tensor.dtype).removeprefix("torch.") for tensor in converted.tensors.values()}
    return tuple(kind if kind in after else f"{kind} -> {', '.join(sorted(after))}" for kind in before)


def _finish(given: Given, options: Options) -> Model:
    """The model, with another preprocessing and another size where they are asked for; both in the report."""
    model, image, preprocess = build(given, options.dropout, options.drop_path), options.image, options.preprocess
    report, backbone = given.report, model.backbone if isinstance(model, Classifier) else model
    if preprocess is not None:
        if isinstance(preprocess, str):
            preprocess = changed(model.preprocess, preprocess)
        if preprocess.channels != backbone.config.channels:
            raise UserError(
                f"the preprocessing gives {preprocess.channels} channels, but {report.path} takes "
                f"{backbone.config.channels}: give a mean and a deviation for each of its channels"
            )
        model.preprocess = preprocess
        report = replace(report, preprocess_source="given by hand")
    if image is not None:
        before = backbone.config
        try:
            if isinstance(model, Classifier):
                resize_classifier(model, image)
            else:
                resize_backbone(model, image)
        except RuntimeError as error:  # what torch raises where there is not so much memory
            raise UserError(
                f"{report.path} cannot be taken to {image[0]} x {image[1]} pixels ({str(error).splitlines()[0]}): give a "
                "smaller image"
            ) from error
        after = backbone.config
        if isinstance(before, ViTConfig) and before.positions in TABLES and before.grid != after.grid:
            grids = [f"{config.grid[0]} x {config.grid[1]}" for config in (before, after)]
            said = f"position table from {grids[0]} to {grids[1]} by {before.numerics.resample}"
            report = replace(report, resampled=(said,))
    return _finished(model, replace(report, preprocess=model.preprocess))


def _finished(model: Model, report: LoadReport) -> Model:
    setattr(model, "report", report)  # noqa: B010, models know nothing of reports
    return model
