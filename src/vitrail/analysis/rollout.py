"""Attention followed through all layers: rollout (Fig. 6, 14), and the gradient-weighted kind for one class.

Unusual: both are products of one (t x t) matrix a layer, of which a single row is wanted. So the row is carried from the
last layer to the first, a vector times a matrix each, and neither the product nor two layers' maps ever exist. Gradients
go the same way, so the second kind differentiates one block at a time, from the tokens that a Trace holds.
"""

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from vitrail.analysis.internals import Model, Trace, answer_reads, evaluating, joined, trace
from vitrail.core.errors import UserError
from vitrail.core.types import Features
from vitrail.layers.attention import attention_map
from vitrail.models.classifier import Classifier


def rollout(of: Trace, start: Float[Tensor, "b t"] | None = None) -> Float[np.ndarray, "b t"]:
    """How much of each input token arrives in the answer, prefix tokens first; sums to 1.

    Attention rollout ("Quantifying Attention Flow in Transformers", arXiv 2005.00928, section 4) as in appendix D.8 and
    the author's code in google-research/vision_transformer issue 18: the mean over heads, plus the identity for the
    residual, rows divided by their sum, multiplied from the first layer to the last; then the class token's row.

    start: the mixture of last tokens whose row it is; by default `answer_reads`, in the paper's model the class token.
    """
    flow = answer_reads(of) if start is None else start
    for layer in reversed(range(of.depth)):
        # Rows of a map sum to 1, so rows of map + identity sum to 2.
        flow = (torch.einsum("bq,bqk->bk", flow, of.weights(layer).mean(1)) + flow) / 2
    return flow.float().cpu().numpy()


def class_relevance(
    model: Model, images: Shaped[Tensor, "b c h w"], classes: Int[Tensor, "b"]
) -> Float[np.ndarray, "b t"]:
    """How much each input token speaks for a class, prefix tokens first; in no unit, at least 0.

    Gradient-weighted attention ("Generic Attention-model Explainability", arXiv 2103.15679): in each layer the map times
    the gradient of the class's logit by it, negative products set to 0, the mean over heads (Eq. 5); R = identity, then
    R = R + that R from the first layer to the last (Eq. 6); then the class token's row, or its mean over `answer_reads`.

    classes: each picture's class. Raises UserError where the model is no classifier, or has no attention.
    """
    if not isinstance(model, Classifier):
        raise UserError("the model has no head, so there is no class to ask for: give a classifier's checkpoint.")
    of = trace(model, images)
    with evaluating(model), torch.enable_grad():
        last = joined(of.features.layers[-1]).detach().requires_grad_()
        logits = _head(model, of, last)
        (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), last)
        relevance = answer_reads(of)
        for layer in reversed(range(of.depth)):
            weights, by_weights, gradient = _through_block(of, layer, gradient)
            relevance = relevance + torch.einsum("bq,bqk->bk", relevance, (weights * by_weights).relu().mean(1))
            del weights, by_weights
    return relevance.float().cpu().numpy()


def _head(model: Classifier, of: Trace, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b k"]:
    x = of.backbone.encoder.norm(x)
    pooled = model.pool(Features(x[:, : of.prefixes], x[:, of.prefixes :], of.grid, of.stride))
    return model.head(pooled if model.pool_norm is None else model.pool_norm(pooled))


def _through_block(of: Trace, layer: int, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The map of a block, and what was differentiated: by the map, and by the block's input."""
    block, x = of.block(layer), of.given(layer).detach().requires_grad_()
    query, key, value = block.attention.project(block.attention_norm(x), of.positions)
    weights = attention_map(query, key, block.attention.mask(query, of.positions))
    y = block.add_attended(x, block.attention.merge(weights @ value))
    y = block.add_transformed(y, block.mlp(block.mlp_norm(y)))
    by_weights, by_x = torch.autograd.grad(y, (weights, x), gradient)
    return weights.detach(), by_weights, by_x
