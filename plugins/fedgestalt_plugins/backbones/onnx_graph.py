"""Face networks from ONNX files, as trees of ordinary ``nn.Module``s.

- Weights behind ``DequantizeLinear`` and ``Reshape`` become float32.
- The graph is cut at its last Gemm, or product with a constant matrix: what comes before is the
  trunk, the Gemm and the BatchNormalization behind it become a :class:`Neck`. Flatten, Reshape and
  Dropout around the cut belong to the neck.
- A BatchNormalization that follows a convolution in the trunk is folded into it.
- The last stage begins behind the last value through which everything flows before the last
  convolution with a stride: in a residual network, before the last block that shrinks the map.
- An operator without a counterpart here is refused by name, never approximated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fedgestalt.contracts import FACE_SIZE, StageCut
from fedgestalt.errors import ConfigError
from fedgestalt_plugins.backbones.neck import Neck

Constants = dict[str, NDArray[Any]]

SHAPE_ONLY: Final = frozenset({"Flatten", "Reshape", "Dropout", "Identity"})
ARITHMETIC: Final[Mapping[str, Callable[[Any, Any], torch.Tensor]]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
}


@dataclass(frozen=True)
class FaceNetwork:
    """An imported network in evaluation mode.

    Attributes:
        trunk: (n, 3, size, size) -> (n, *feature_shape); its BatchNormalizations are folded.
        neck: (n, *feature_shape) -> (n, embedding_size).
        size: side of the input image in pixels.
        feature_shape: shape of one feature.
        embedding_size: length of one encoding.
        cut: of the trunk; None if no convolution has a stride.
        takes_pixels: whether the file scales the pixels itself, by arithmetic before its first
            convolution; otherwise it takes -1..1.
    """

    trunk: nn.Module
    neck: Neck
    size: int
    feature_shape: tuple[int, ...]
    embedding_size: int
    cut: StageCut | None
    takes_pixels: bool


@dataclass(frozen=True)
class Node:
    """One operator: its name for people, what flows in and out, its attributes."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]


class Arithmetic(nn.Module):
    """Add, Sub or Mul of two values, or of one value and a constant."""

    def __init__(self, operator: str, constant: NDArray[Any] | None, *, first: bool) -> None:
        super().__init__()
        self._function, self._first = ARITHMETIC[operator], first
        value = None if constant is None else torch.tensor(constant, dtype=torch.float32)
        self.constant: torch.Tensor | None
        self.register_buffer("constant", value)

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """Broadcast like ONNX, which broadcasts like torch."""
        if self.constant is not None:
            values = (self.constant, *values) if self._first else (*values, self.constant)
        return self._function(*values)


class Reshape(nn.Module):
    """Reshape everything but the batch; 0 keeps a dimension."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (n, ...) to (n, *shape)."""
        kept = [size or x.shape[index] for index, size in enumerate(self._shape, start=1)]
        return x.reshape(x.shape[0], *kept)


class OperatorGraph(nn.Module):
    """Runs layers in the order of the file and forgets each value after its last use."""

    def __init__(self, nodes: list[Node], layers: list[nn.Module], source: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        last = {name: index for index, node in enumerate(nodes) for name in node.inputs}
        self._source = source
        self._wiring = [
            (node.inputs, node.output, [name for name in set(node.inputs) if last[name] == index])
            for index, node in enumerate(nodes)
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the last layer."""
        values = {self._source: x}
        for layer, (inputs, output, finished) in zip(self.layers, self._wiring, strict=True):
            x = layer(*(values[name] for name in inputs))
            for name in finished:
                del values[name]
            values[output] = x
        return x


def read_face_network(path: Path, *, dropout: float = 0.0, size: int | None = None) -> FaceNetwork:
    """Import a face network.

    Args:
        path: an ONNX file with one image input (n, 3, size, size) and one encoding (n, f); a size
            that the file leaves open becomes 112.
        dropout: share of the flattened feature that the neck drops in training.
        size: of the image, where the file leaves it open.

    Raises:
        ConfigError: it fixes another size, is no ONNX file or no face network, or has an operator
            that is not known here.
    """
    try:
        graph = onnx.load(path).graph
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise ConfigError(f"cannot be read as an ONNX file: {error}", where=str(path)) from None
    return _Importer(graph, str(path), size).network(dropout)


class _Importer:
    def __init__(self, graph: onnx.GraphProto, where: str, size: int | None) -> None:
        self._where = where
        self._constants: Constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
        # Quantised files also list their weights, even those that were replaced, as inputs.
        read = {name for node in graph.node for name in node.input} - self._constants.keys()
        inputs = [entry for entry in graph.input if entry.name in read]
        shape = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim] if inputs else []
        if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
            raise self._error("not a face network: it needs one input of shape (n, 3, size, size)")
        if size and shape[2] and size != shape[2]:
            what = f"the file takes images of {shape[2]} x {shape[2]} pixels, not {size} x {size}"
            raise self._error(what, "set input_size to that of the file, or leave it out")
        self._source, self._size = inputs[0].name, shape[2] or size or FACE_SIZE
        self._nodes = self._fold_constants(graph)

    def network(self, dropout: float) -> FaceNetwork:
        """Cut at the last Gemm and build both sides."""
        gemms = [index for index, node in enumerate(self._nodes) if node.operator == "Gemm"]
        if not gemms:
            raise self._error("not a face network: it has no Gemm (linear layer)")
        cut = gemms[-1]
        before, gemm, after = self._nodes[:cut], self._nodes[cut], self._nodes[cut + 1 :]
        while before and before[-1].operator in SHAPE_ONLY:
            before.pop()
        nodes, layers = self._folded(before)
        trunk = OperatorGraph(nodes, layers, self._source).eval().requires_grad_(False)
        try:
            with torch.inference_mode():
                feature = trunk(torch.zeros(1, 3, self._size, self._size))
        except (RuntimeError, KeyError) as error:
            raise self._error(f"not a face network: its layers do not fit: {error}") from None
        neck = self._neck(gemm, after, dropout)
        if feature[0].numel() != neck.fc.in_features:
            raise self._error(
                f"not a face network: Gemm {gemm.name!r} does not take the feature map of an image"
                f" of {self._size} x {self._size} pixels",
                "set input_size if the network wants another",
            )
        shape = tuple(feature.shape[1:])
        stages = self._last_stage(nodes, layers)
        first = next((i for i, n in enumerate(nodes) if n.operator == "Conv"), len(nodes))
        takes_pixels = any(node.operator in ARITHMETIC for node in nodes[:first])
        encoding = neck.fc.out_features
        return FaceNetwork(trunk, neck.eval(), self._size, shape, encoding, stages, takes_pixels)

    def _last_stage(self, nodes: list[Node], layers: list[nn.Module]) -> StageCut | None:
        strided = [
            index
            for index, layer in enumerate(layers)
            if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1
        ]
        for start in range(max(strided, default=0), 0, -1):
            before = {self._source, *(node.output for node in nodes[:start])}
            crossing = before & {name for node in nodes[start:] for name in node.inputs}
            if len(crossing) == 1 and self._source not in crossing:
                (value,) = crossing
                break
        else:
            return None
        kept = next(i for i, node in enumerate(nodes[:start]) if node.output == value) + 1
        early = OperatorGraph(nodes[:kept], layers[:kept], self._source).eval()
        last = OperatorGraph(nodes[start:], layers[start:], value).eval()
        with torch.inference_mode():
            feature = early(torch.zeros(1, 3, self._size, self._size))
        return StageCut(early, last, tuple(feature.shape[1:]))

    def _error(self, what: str, remedy: str = "") -> ConfigError:
        return ConfigError(what, where=self._where, remedy=remedy)

    def _fold_constants(self, graph: onnx.GraphProto) -> list[Node]:
        kept = []
        for proto in graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}
            inputs, name = tuple(proto.input), proto.name or proto.output[0]
            node = Node(proto.op_type, name, inputs, proto.output[0], attributes)
            known = all(name in self._constants for name in inputs if name)
            if node.operator == "Constant" and "value" in attributes:
                self._constants[node.output] = numpy_helper.to_array(attributes["value"])
            elif known and node.operator == "Identity":
                self._constants[node.output] = self._constants[inputs[0]]
            elif known and node.operator == "Reshape":
                value, shape = (self._constants[name] for name in inputs)
                self._constants[node.output] = value.reshape(shape)
            elif known and node.operator == "DequantizeLinear":
                self._constants[node.output] = self._dequantised(node)
            else:
                kept.append(self._as_gemm(node))
        return kept

    def _as_gemm(self, node: Node) -> Node:
        """A product with a constant matrix is a linear layer without a bias."""
        linear = node.operator == "MatMul" and node.inputs[1] in self._constants
        if not linear or self._constants[node.inputs[1]].ndim != 2:
            return node
        return Node("Gemm", node.name, node.inputs, node.output, {})

    def _dequantised(self, node: Node) -> NDArray[np.float32]:
        weights, scale = (self._constants[name] for name in node.inputs[:2])
        zero = self._constants[node.inputs[2]] if len(node.inputs) > 2 else np.zeros_like(scale)
        axis, block = node.attributes.get("axis", 1), node.attributes.get("block_size", 0)

        def spread(values: NDArray[Any]) -> NDArray[np.float32]:
            values = values.astype(np.float32)
            if block:
                blocks = np.repeat(values, block, axis=axis)
                return np.take(blocks, np.arange(weights.shape[axis]), axis=axis)
            return values.reshape(
                [-1 if i == axis % weights.ndim else 1 for i in range(weights.ndim)]
            )

        return (weights.astype(np.float32) - spread(zero)) * spread(scale)

    def _folded(self, nodes: list[Node]) -> tuple[list[Node], list[nn.Module]]:
        """Nodes with their values only (no constants), and their layers; BatchNorms folded."""
        uses = [name for node in nodes for name in node.inputs]
        kept: list[Node] = []
        layers: list[nn.Module] = []
        for node in nodes:
            layer = self._layer(node)
            values = tuple(name for name in node.inputs if name and name not in self._constants)
            node = Node(node.operator, node.name, values, node.output, node.attributes)
            previous = layers[-1] if layers and values == (kept[-1].output,) else None
            if (
                isinstance(previous, nn.Conv2d)
                and isinstance(layer, nn.BatchNorm2d)
                and uses.count(values[0]) == 1
            ):
                layers[-1] = fuse_conv_bn_eval(previous, layer)
                kept[-1] = Node("Conv", node.name, kept[-1].inputs, node.output, {})
            else:
                kept.append(node)
                layers.append(layer)
        return kept, layers

    def _neck(self, gemm: Node, after: list[Node], dropout: float) -> Neck:
        linear = self._linear(gemm)
        after = [node for node in after if node.operator not in SHAPE_ONLY]
        extra = after[1:] if after and after[0].operator == "BatchNormalization" else after
        if extra:
            what = f"operator {extra[0].operator} of node {extra[0].name!r} follows the last Gemm"
            raise self._error(what, "only a BatchNormalization may")
        norm = (
            self._norm(after[0], nn.BatchNorm1d) if after else nn.BatchNorm1d(linear.out_features)
        )
        neck = Neck(linear.in_features, linear.out_features, dropout=dropout, eps=norm.eps)
        neck.fc.load_state_dict(linear.state_dict())
        neck.features.load_state_dict(norm.state_dict())
        return neck

    def _layer(self, node: Node) -> nn.Module:
        match node.operator:
            case "Conv":
                return self._convolution(node)
            case "BatchNormalization":
                return self._norm(node, nn.BatchNorm2d)
            case "PRelu":
                slope = self._weight(node, 1).flatten()
                prelu = nn.PReLU(slope.numel())
                prelu.weight = nn.Parameter(slope)
                return prelu
            case "Relu":
                return nn.ReLU()
            case "Add" | "Sub" | "Mul":
                sides = [self._constants.get(name) for name in node.inputs]
                constant = next((side for side in sides if side is not None), None)
                return Arithmetic(node.operator, constant, first=sides[0] is not None)
            case "Gemm":
                return self._linear(node)
            case "Flatten" if node.attributes.get("axis", 1) == 1:
                return nn.Flatten()
            case "Reshape" if node.inputs[1] in self._constants:
                return Reshape(tuple(int(size) for size in self._constants[node.inputs[1]][1:]))
            case "GlobalAveragePool":
                return nn.AdaptiveAvgPool2d(1)
            case "Dropout" | "Identity":
                return nn.Identity()
        known = "Conv, BatchNormalization, PRelu, Relu, Add, Sub, Mul, Gemm, Flatten, Reshape, "
        remedy = f"known operators: {known}GlobalAveragePool, Dropout, Identity, Constant"
        raise self._error(f"operator {node.operator} of node {node.name!r} is not known", remedy)

    def _weight(self, node: Node, index: int) -> torch.Tensor:
        if node.inputs[index] not in self._constants:
            raise self._error(f"input {index} of {node.operator} {node.name!r} is not a constant")
        return torch.tensor(self._constants[node.inputs[index]], dtype=torch.float32)

    def _convolution(self, node: Node) -> nn.Conv2d:
        weight, given = self._weight(node, 1), node.attributes
        pads = given.get("pads", [0, 0, 0, 0])
        if (
            weight.ndim != 4
            or pads[:2] != pads[2:]
            or given.get("auto_pad", b"NOTSET") != b"NOTSET"
        ):
            raise self._error(f"Conv {node.name!r} is not two-dimensional with symmetric padding")
        groups, biased = given.get("group", 1), len(node.inputs) > 2
        layer = nn.Conv2d(
            weight.shape[1] * groups,
            weight.shape[0],
            (weight.shape[2], weight.shape[3]),
            stride=tuple(given.get("strides", (1, 1))),
            padding=tuple(pads[:2]),
            dilation=tuple(given.get("dilations", (1, 1))),
            groups=groups,
            bias=biased,
        )
        layer.weight = nn.Parameter(weight)
        if biased:
            layer.bias = nn.Parameter(self._weight(node, 2))
        return layer.eval()

    def _norm(
        self, node: Node, kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d]
    ) -> nn.BatchNorm1d | nn.BatchNorm2d:
        scale, shift, mean, variance = (self._weight(node, index) for index in range(1, 5))
        layer = kind(scale.numel(), eps=node.attributes.get("epsilon", 1e-5))
        names = ("weight", "bias", "running_mean", "running_var")
        values = zip(names, (scale, shift, mean, variance), strict=True)
        layer.load_state_dict(dict(values), strict=False)
        return layer.eval()

    def _linear(self, node: Node) -> nn.Linear:
        weight, given = self._weight(node, 1), node.attributes
        if given.get("transA", 0) or not math.isclose(given.get("alpha", 1.0), 1.0):
            raise self._error(f"Gemm {node.name!r} is not a linear layer")
        weight = weight if given.get("transB", 0) else weight.T.contiguous()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight = nn.Parameter(weight)
        bias = self._weight(node, 2) * given.get("beta", 1.0) if len(node.inputs) > 2 else 0
        layer.bias = nn.Parameter(torch.zeros(weight.shape[0]) + bias)
        return layer
