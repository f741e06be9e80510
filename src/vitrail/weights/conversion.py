"""What a format module takes and gives: the accounting of a foreign checkpoint's keys, and the model they make.

A format is a plain module. It claims checkpoints that it `recognises`, and its `convert` moves every tensor through
`Keys`, so that nothing in a file is lost or made up without a word: what was neither taken nor skipped is an error.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.resnet import ResNet, ResNetConfig
from vitrail.models.vit import ViT, ViTConfig
from vitrail.weights.source import Checkpoint

Head = Literal["usable", "absent", "all zeros"]
Config = ClassifierConfig | ViTConfig | ResNetConfig
Model = Classifier | ViT | ResNet


@dataclass(frozen=True)
class Converted:
    """A checkpoint in Vitrail's names, complete: `config` builds a model whose state_dict has exactly `tensors`.

    config: a ClassifierConfig where the file has a head that is usable or all zeros; else its backbone's.
    tensors: each contiguous, with the model's exact shape, in the file's own dtype.
    preprocess: its size may differ from config's image where the file states both.
    preprocess_source: "stated in FILE", or "assumed: WHY".
    labels: the classes' names in the logits' order, where the file states them.
    renamed: each foreign key and where it went. folded: sentences on what was computed from several tensors.
    left_out: foreign key, or a pattern that ends in *, and why it is not needed.
    notes: sentences for the person, such as a guessed number of heads.
    extra: an MAE decoder's tensors, in MAEDecoder's names.
    """

    config: Config
    tensors: dict[str, Tensor]
    preprocess: Preprocess
    preprocess_source: str
    labels: tuple[str, ...] = ()
    head: Head = "usable"
    renamed: dict[str, str] = field(default_factory=dict)
    folded: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    extra: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Format(Protocol):
    """A module for one family of files. One that can be written also has `write(model, destination) -> notes`."""

    NAME: str

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """From names, shapes and config alone; no tensor is read."""
        ...

    def convert(
        self, checkpoint: Checkpoint, *, heads: int | None = None, grid: tuple[int, int] | None = None
    ) -> Converted:
        """heads, grid (rows, columns of the position table): for files that cannot say, and only for those.

        Raises UserError where the file is not whole, needs one of the two, or contradicts it.
        """
        ...


@runtime_checkable
class Writer(Protocol):
    """A format that can be written."""

    NAME: str

    def write(self, model: Model, destination: Path) -> tuple[str, ...]:
        """What had to be folded or left out, in sentences. Raises UserError where the format cannot hold the model."""
        ...


class Keys:
    """A checkpoint's tensors under `prefix`, each to be taken once or skipped with a reason. Names are without it.

    tensors, renamed, left_out: what becomes Converted's.
    """

    def __init__(self, checkpoint: Checkpoint, prefix: str = "") -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.tensors: dict[str, Tensor] = {}
        self.renamed: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self._left = dict.fromkeys(checkpoint.names)

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has it, taken already or not."""
        return self.prefix + name in self.checkpoint

    def __iter__(self) -> Iterator[str]:
        """The names under the prefix that are still to be taken, in the file's order."""
        return iter([name.removeprefix(self.prefix) for name in self._left if name.startswith(self.prefix)])

    def count(self, template: str) -> int:
        """How many of template.format(0), template.format(1), ... there are without a gap: "blocks.{}.norm1.weight"."""
        number = 0
        while template.format(number) in self:
            number += 1
        return number

    def shape(self, name: str, axes: int | None = None) -> tuple[int, ...]:
        """Of a tensor that must be there, with that many axes."""
        self._require(name)
        shape = self.checkpoint.shape(self.prefix + name)
        if axes is not None and len(shape) != axes:
            raise UserError(
                f"{self.checkpoint.path} holds {self.prefix + name} of shape {shape}, where {axes} axes were expected: "
                "use a checkpoint that was not changed"
            )
        return shape

    def take(self, name: str, ours: str | None = None, transform: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Reads a tensor, once, and hands it through `transform`; with `ours`, that is the parameter it becomes."""
        self._require(name)
        full = self.prefix + name
        if full not in self._left:
            raise ValueError(f"{full} was taken or skipped before")
        del self._left[full]
        kind = self.checkpoint.dtype(full)
        if "float" not in kind:
            raise UserError(
                f"{self.checkpoint.path} holds {full} in {kind}, where weights are floating numbers: use a checkpoint that "
                "was neither changed nor quantised"
            )
        tensor = self.checkpoint.read(full)
        if transform is not None:
            try:
                tensor = transform(tensor)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise UserError(
                    f"{self.checkpoint.path} holds {full} of shape {self.checkpoint.shape(full)}, which does not fit the "
                    f"other tensors ({str(error).splitlines()[0]}): use a checkpoint that was not changed"
                ) from error
        if ours is not None:
            self.put(ours, tensor, name)
        return tensor

    def put(self, ours: str, tensor: Tensor, *names: str) -> None:
        """A parameter of ours that was made from the tensors `names` (taken before)."""
        if ours in self.tensors:
            raise ValueError(f"{ours} was made before")
        self.tensors[ours] = tensor.contiguous()
        self.renamed.update(dict.fromkeys((self.prefix + name for name in names), ours))

    def skip(self, name: str, why: str, width: int | None = None) -> None:
        """Leaves a tensor out, unread, if it is there; a name that ends in * stands for all that begin so.

        width: the one row that it is must be so long, or the file is not what it seems.
        """
        if (
            width is not None
            and self.prefix + name in self._left
            and self.shape(name) not in ((1, width), (1, 1, width))
        ):
            raise UserError(
                f"{self.checkpoint.path} holds {self.prefix + name} of shape {self.shape(name)}, where a row of {width} "
                "numbers was expected: use a checkpoint that was not changed"
            )
        self._skip(self.prefix + name, why)

    def skip_outside(self, why: str) -> None:
        """Leaves out all that does not begin with the prefix: an optimiser's state, the other network of a pair."""
        groups: dict[str, int] = {}
        for full in [full for full in self._left if not full.startswith(self.prefix)]:
            del self._left[full]
            group = full.split(".")[0] + ".*" if "." in full else full
            groups[group] = groups.get(group, 0) + 1
        self.left_out.update({group: _counted(why, number, group) for group, number in groups.items()})

    def finish(self) -> None:
        """Raises UserError, naming them, where tensors are left that nobody took."""
        if self._left:
            names = list(self._left)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(
                f"{self.checkpoint.path} holds tensors that its kind of model does not have, "
                f"{', '.join(names[:5])}{more}: "
                "use a plain checkpoint, or remove them from the file"
            )

    def _skip(self, pattern: str, why: str) -> None:
        if not pattern.endswith("*"):
            found = [pattern] if pattern in self._left else []
        else:
            found = [full for full in self._left if full.startswith(pattern[:-1])]
        for full in found:
            del self._left[full]
        if found:
            self.left_out[pattern] = _counted(why, len(found), pattern)

    def _require(self, name: str) -> None:
        if name not in self:
            raise UserError(
                f"{self.checkpoint.path} lacks the tensor {self.prefix + name}: use a checkpoint that is whole"
            )


def _counted(why: str, number: int, pattern: str) -> str:
    return f"{why} ({number} tensors)" if pattern.endswith("*") and number > 1 else why
