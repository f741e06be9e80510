"""One picture's way through a model, step by step, from a real run: what comes out of each, and what it costs.

Nothing here is a table of what should be. Shapes are those of the tensors that came out, parameters those of the modules
that ran, MACs are counted by PyTorch while the step runs, and time is measured. The attention map is written down, as Eq. 6
has it, where the model itself uses fused attention; the answer is the same.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrail.analysis.internals import Model, evaluating
from vitrail.core.types import Features, Positions
from vitrail.layers.attention import attention_map
from vitrail.layers.convolutions import max_pool
from vitrail.layers.transformer import MLP, Block
from vitrail.models.classifier import Classifier
from vitrail.models.resnet import ResNet, Trunk
from vitrail.models.vit import ViT

REPEATS = 3


@dataclass(frozen=True)
class Step:
    """group: "picture", "block 3", "answer"... shape: of what comes out, for one picture; seconds: the best of three."""

    group: str
    name: str
    words: str
    equation: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    seconds: float


@dataclass
class Walk:
    """All steps in order, and what came out at the end: probabilities (k,), an embedding, or all tokens (t, d)."""

    steps: list[Step] = field(default_factory=list)
    output: Tensor = field(default_factory=lambda: torch.empty(0))

    def take(
        self,
        group: str,
        name: str,
        words: str,
        equation: str,
        compute: Callable[[], Tensor],
        *parts: nn.Module | nn.Parameter | None,
    ) -> Tensor:
        """Runs one step, writes it down and hands on what came out. parts: whose parameters it uses."""
        with FlopCounterMode(display=False) as counter:
            result = compute()
        seconds = min(_seconds(compute, result.device) for _ in range(REPEATS))
        shape = tuple(result.shape[1:]) if result.shape[0] == 1 and result.ndim > 1 else tuple(result.shape)
        macs = counter.get_total_flops() // 2
        self.steps.append(Step(group, name, words, equation, shape, sum(map(_count, parts)), macs, seconds))
        return result


@torch.no_grad()
def walk(model: Model, pixels: UInt8[Tensor, "one c h w"]) -> Walk:
    """From a prepared picture, as `read` gives it, to the answer. Raises UserError for a size that does not fit."""
    taken = Walk()
    with evaluating(model):
        x = taken.take(
            "picture",
            "normalise",
            "each channel's mean is taken off, and what is left divided by its deviation",
            "",
            lambda: model.preprocess.normalize(pixels).to(next(model.parameters()).dtype),
        )
        backbone = model.backbone if isinstance(model, Classifier) else model
        features = _resnet(taken, backbone, x) if isinstance(backbone, ResNet) else _vit(taken, backbone, x)
        if isinstance(model, Classifier):
            taken.output = _answer(taken, model, features)[0]
        else:
            taken.output = torch.cat([features.prefix, features.tokens], 1)[0]
    return taken


def _vit(taken: Walk, model: ViT, x: Tensor) -> Features:
    config, images = model.config, x
    model.tokenize(images)  # says what is wrong with the size, in a sentence
    if model.trunk is not None:
        x = _trunk(taken, model.trunk, x)
    tall, wide = config.patch
    of = "the map's cells" if model.trunk is not None else "pixels"
    cells = x
    taken.take(
        "words",
        "patches, flattened",
        f"cut into squares of {tall} x {wide} {of}; each becomes one row of numbers",
        "Eq. 1: x_p",
        lambda: F.unfold(cells.float(), config.patch, stride=config.patch).mT,
    )
    tokens = model.patch_embedding(cells)
    x = taken.take(
        "words",
        "linear projection",
        "one matrix turns every row into a word of the model's width",
        "Eq. 1: x_p E",
        lambda: model.patch_embedding(cells).x,
        model.patch_embedding,
    )
    if model.prefix is not None:
        words = x
        names = ["class token"] * config.class_token + ["distillation token"] * config.distillation_token
        names += [f"{config.registers} registers"] * bool(config.registers)
        x = taken.take(
            "words",
            " and ".join(names),
            "learned words that are no patches stand in front; the first will hold the answer"
            if config.class_token
            else "learned words that are no patches stand in front",
            "Eq. 1: [x_class; x_p E]",
            lambda: model.prepend(words),
            model.prefix,
        )
    positions = model.positions(tokens)
    if positions.stem is not None or config.pre_norm:
        bare = x
        x = taken.take(
            "words",
            "positions",
            "to each word is added where it stands" if positions.stem is not None else "a first norm",
            "Eq. 1: + E_pos" if positions.stem is not None else "",
            lambda: model.encoder.enter(bare, model.positions(tokens)),
            model.position_embedding if positions.stem is not None else None,
            model.encoder.pre_norm,
        )
    elif model.position_embedding is not None and positions.per_layer is None:
        kind = "turns queries and keys" if positions.rotary is not None else "is added to the attention's logits"
        stays = x
        x = taken.take(
            "words",
            "positions",
            f"nothing is added here: in every block, position {kind}",
            "",
            lambda: stays,
            model.position_embedding,
        )
    for number, block in enumerate(model.encoder.blocks):
        group = f"block {number + 1}"
        if positions.per_layer is not None:
            holders = model.position_embedding
            own = list(holders.children()) if isinstance(holders, nn.ModuleList) else []
            x = taken.take(
                group,
                "positions",
                "to each word is added, once more, where it stands",
                "Table 8",
                partial(torch.add, x, positions.per_layer[number]),
                own[number] if number < len(own) else None,
            )
        assert isinstance(block, Block)
        x = _block(taken, group, number + 1, block, x, positions)
    last = x
    x = taken.take(
        "answer",
        "last norm",
        "the words at the end",
        "Eq. 4: LN(z_L)",
        lambda: model.encoder.norm(last),
        model.encoder.norm,
    )
    return Features(x[:, : config.prefixes], x[:, config.prefixes :], tokens.grid, config.stride)


def _block(taken: Walk, group: str, number: int, block: Block, x: Tensor, positions: Positions) -> Tensor:
    attention, mlp, before = block.attention, block.mlp, x
    step = partial(taken.take, group)
    previous = number - 1
    normed = step(
        "norm",
        "each word by itself: mean 0, variance 1, then a learned scale and shift",
        f"Eq. 2: LN(z_{previous})",
        lambda: block.attention_norm(before),
        block.attention_norm,
    )
    qkv = step(
        "queries, keys, values",
        "each word becomes, in each head, a question, a label and a message",
        "Eq. 5: [q, k, v] = z U_qkv",
        lambda: torch.stack(attention.project(normed, positions), 1),
        attention.qkv,
        attention.query_norm,
        attention.key_norm,
    )
    query, key, value = qkv.unbind(1)
    weights = step(
        "attention",
        "how well each question fits each label, as shares: every row sums to 1",
        "Eq. 6: A = softmax(q k^T / sqrt(D_h))",
        lambda: attention_map(query, key, attention.mask(query, positions)),
    )
    mixed = step(
        "weighted sum",
        "each word collects the messages of those it looks at",
        "Eq. 7: SA(z) = A v",
        lambda: weights @ value,
    )
    merged = step(
        "concatenation, projection",
        "the heads side by side, through one matrix",
        "Eq. 8: MSA(z) = [SA_1(z); ...; SA_k(z)] U_msa",
        lambda: attention.merge(mixed),
        attention.output,
    )
    middle = step(
        "residual",
        "what was collected is added to what the word was",
        f"Eq. 2: z'_{number} = MSA(LN(z_{previous})) + z_{previous}",
        lambda: block.add_attended(before, merged),
        block.attention_scale,
    )
    again = step("norm", "as before", f"Eq. 3: LN(z'_{number})", lambda: block.mlp_norm(middle), block.mlp_norm)
    kind = "GELU" if isinstance(mlp, MLP) else "SwiGLU"
    hidden = step(
        f"MLP, hidden layer ({kind})",
        "each word by itself, made wider",
        "Eq. 3: MLP",
        lambda: mlp.expand(again),
        mlp.hidden,
    )
    out = step(
        "MLP, output",
        "and back to the model's width",
        "Eq. 3: MLP(LN(z'))",
        lambda: mlp.contract(hidden),
        mlp.output,
    )
    return step(
        "residual",
        "added to what the word was",
        f"Eq. 3: z_{number} = MLP(LN(z'_{number})) + z'_{number}",
        lambda: block.add_transformed(middle, out),
        block.mlp_scale,
    )


def _trunk(taken: Walk, trunk: Trunk, x: Tensor) -> Tensor:
    images = x
    root = taken.take(
        "trunk",
        "root convolution",
        "7 x 7 pixels at every second place; weights standardised",
        "3.1, hybrid",
        lambda: trunk.root_norm(trunk.root(images)).relu(),
        trunk.root,
        trunk.root_norm,
    )
    x = taken.take(
        "trunk", "max-pool", "the largest of 3 x 3, at every second place", "", lambda: max_pool(root, trunk.rule)
    )
    return _stages(taken, trunk.stages, x)


def _resnet(taken: Walk, model: ResNet, x: Tensor) -> Features:
    images = x
    root = taken.take(
        "root",
        "root convolution",
        "7 x 7 pixels at every second place; weights standardised",
        "4.1, ResNet (BiT)",
        lambda: model.root(images),
        model.root,
    )
    rule = model.config.standardization
    x = taken.take("root", "max-pool", "the largest of 3 x 3, at every second place", "", lambda: max_pool(root, rule))
    last = _stages(taken, model.stages, x)
    x = taken.take(
        "answer",
        "last norm, ReLU",
        "GroupNorm, and what is negative becomes 0",
        "",
        lambda: model.norm(last).relu(),
        model.norm,
    )
    tokens = x.flatten(2).mT
    return Features(tokens[:, :0], tokens, (x.shape[2], x.shape[3]), model.config.stride)


def _stages(taken: Walk, stages: nn.ModuleList, x: Tensor) -> Tensor:
    for number, stage in enumerate(stages):
        for place, unit in enumerate(stage.children()):
            words = "1 x 1, 3 x 3, 1 x 1 convolutions, and the input added"
            x = taken.take(f"stage {number + 1}", f"unit {place + 1}", words, "", partial(unit, x), unit)
    return x


def _answer(taken: Walk, model: Classifier, features: Features) -> Tensor:
    kind = {
        "class": ("class token", "of all words the first alone", "Eq. 4: y = LN(z_L^0)"),
        "mean": ("mean", "the mean of all words", "D.3: GAP"),
        "attention": ("attention pool", "a learned question looks at all words", "MAP head"),
        "class-mean": ("class token and mean", "both side by side", ""),
        "prefix": ("class and distillation token", "both side by side", ""),
    }[model.config.pool]
    x = taken.take("answer", *kind, lambda: model.pool(features), model.pool)
    if model.pool_norm is not None:
        norm, pooled = model.pool_norm, x
        x = taken.take("answer", "norm", "of what was pooled", "", lambda: norm(pooled), norm)
    if model.config.head == "none":
        return x
    head = model.head
    hidden = getattr(head, "hidden", None)
    words = "one number a class" if hidden is None else "a tanh layer, then one number a class"
    given = x
    logits = taken.take(
        "answer",
        "head",
        words,
        "3.1: MLP head" if hidden is not None else "3.1: linear head",
        lambda: head(given),
        head,
    )
    if model.config.output != "logits":
        return logits
    return taken.take("answer", "softmax", "numbers become probabilities", "", lambda: logits.float().softmax(-1))


def _seconds(compute: Callable[[], Tensor], device: torch.device) -> float:
    begun = time.perf_counter()
    compute()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _count(part: nn.Module | nn.Parameter | None) -> int:
    if part is None:
        return 0
    if isinstance(part, nn.Parameter):
        return part.numel()
    return sum(parameter.numel() for parameter in part.parameters())
