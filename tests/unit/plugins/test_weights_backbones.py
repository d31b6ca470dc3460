"""Backbones that begin from a site's own files: ArcFace ONNX and MONAI; the order of colours."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedgestalt.contracts import BackboneModules
from fedgestalt.errors import ConfigError
from fedgestalt.hooks import get_registry
from fedgestalt.learning.encoding import encode as encode_faces
from fedgestalt.learning.ensemble import build_ensemble, read_shared_state
from fedgestalt.learning.images import to_input
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec
from fedgestalt.learning.training import LocalTrainer, TrainingSet
from fedgestalt_plugins.backbones import (
    ArcFaceOnnx,
    ArcFaceOnnxOptions,
    IResNet,
    IResNetOptions,
    Monai,
    MonaiOptions,
)
from fedgestalt_plugins.backbones.iresnet import RowPReLU

CPU = torch.device("cpu")


def disturbed(network: nn.Module) -> nn.Module:
    """With statistics and slopes of its own, so that nothing passes by being neutral."""
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                assert tensor is not None
                tensor.uniform_(-0.3, 0.3, generator=generator)
        elif isinstance(module, nn.PReLU):
            module.weight.data.uniform_(0.1, 0.5, generator=generator)
    return network.eval()


def exported(network: nn.Module, size: int, path: Path, dynamic: bool = False) -> Path:
    """An ONNX file as torch writes it."""
    axes = {"image": {0: "n", 2: "h", 3: "w"}} if dynamic else {"image": {0: "n"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(1, 3, size, size),),
            str(path),
            input_names=["image"],
            dynamic_axes=axes,
            dynamo=False,
        )
    return path


def iresnet(embedding_size: int = 512, size: int = 32, width: int = 4) -> nn.Module:
    options = IResNetOptions(depth=18, width=width, embedding_size=embedding_size, input_size=size)
    built = IResNet().build(options, 1)
    network = nn.Sequential(built.trunk, built.neck)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RowPReLU):  # a layer of ours that ONNX knows by another name
                plain = nn.PReLU(child.num_parameters)
                setattr(parent, name, plain)
    return disturbed(network)


class Residual(nn.Module):
    """Adds what the inner layers make of a value to it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (n, c, h, w) to the same shape."""
        total: torch.Tensor = x + self.inner(x)
        return total


def mobile_facenet(embedding_size: int = 128) -> nn.Module:
    """Chen et al. 2018 in small: depthwise bottlenecks, a global depthwise convolution, no bias."""

    def block(*sizes: int, groups: int = 1, stride: int = 1, kernel: int = 1) -> nn.Sequential:
        inputs, outputs = sizes
        pad = 0 if kernel == 4 else kernel // 2
        conv = nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.PReLU(outputs))

    def bottleneck(channels: int, stride: int) -> nn.Sequential:
        wide = 2 * channels
        return nn.Sequential(
            block(channels, wide),
            block(wide, wide, groups=wide, stride=stride, kernel=3),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    network = nn.Sequential(
        block(3, 8, stride=2, kernel=3),
        bottleneck(8, 2),
        Residual(bottleneck(8, 1)),
        bottleneck(8, 2),
        Residual(bottleneck(8, 1)),
        block(8, 32),
        nn.Conv2d(32, 32, 4, groups=32, bias=False),
        nn.BatchNorm2d(32),
        nn.Flatten(),
        nn.Linear(32, embedding_size, bias=False),
        nn.BatchNorm1d(embedding_size),
    )
    return disturbed(network)


def runtime(path: Path, images: NDArray[np.float32]) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": images})[0])


def encode(modules: BackboneModules, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        encoded: torch.Tensor = modules.neck(modules.trunk(images))
    return encoded


def load(path: Path, **changes: Any) -> BackboneModules:
    return ArcFaceOnnx().build(ArcFaceOnnxOptions(weights=path, **changes), 0)


def refusal(path: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as fault:
        load(path, **changes)
    return str(fault.value)


@pytest.fixture(scope="module")
def images() -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.uniform(-1, 1, (4, 3, 8, 8)), np.ones((4, 4)))
    return (smooth + rng.normal(0, 0.1, smooth.shape)).astype(np.float32)


# --- arcface-onnx --------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding_size", [512, 64])
def test_an_iresnet_file_encodes_like_onnxruntime(
    tmp_path: Path, images: NDArray[np.float32], embedding_size: int
) -> None:
    path = exported(iresnet(embedding_size), 32, tmp_path / "r18.onnx")
    modules = load(path, weights_licence="CC0-1.0")
    assert (modules.embedding_size, modules.feature_shape) == (embedding_size, (32, 2, 2))
    assert (modules.input.size, modules.input.offset, modules.input.scale) == (32, 127.5, 127.5)
    assert modules.weights_licence == "CC0-1.0"
    found, right = encode(modules, torch.from_numpy(images)), runtime(path, images)
    assert torch.cosine_similarity(found, right).min() > 0.99999
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)


def test_a_mobile_facenet_file_encodes_like_onnxruntime(
    tmp_path: Path, images: NDArray[np.float32]
) -> None:
    path = exported(mobile_facenet(), 32, tmp_path / "mbf.onnx")
    modules = load(path)
    assert (modules.embedding_size, modules.feature_shape) == (128, (32, 1, 1))
    found, right = encode(modules, torch.from_numpy(images)), runtime(path, images)
    assert torch.cosine_similarity(found, right).min() > 0.99999
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("network", "shape"), [(iresnet, (16, 4, 4)), (mobile_facenet, (16, 8, 8))]
)
def test_the_last_stage_of_a_file_begins_where_the_map_shrinks_for_the_last_time(
    tmp_path: Path, network: Any, shape: tuple[int, ...]
) -> None:
    modules = load(exported(network(), 32, tmp_path / "net.onnx"))
    assert modules.cut is not None
    assert modules.cut.feature_shape == shape
    image = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        parts = modules.cut.last_stage(modules.cut.early(image))
        torch.testing.assert_close(parts, modules.trunk(image))


def test_a_file_that_scales_pixels_itself_is_given_pixels(
    tmp_path: Path, images: NDArray[np.float32]
) -> None:
    class Scaling(nn.Module):
        """Takes 0..255, as files from MXNet do."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Scale and encode."""
            encoded: torch.Tensor = self.inner((x - 127.5) * 0.0078125)
            return encoded

    path = exported(Scaling(iresnet()).eval(), 32, tmp_path / "mx.onnx")
    modules = load(path)
    assert (modules.input.offset, modules.input.scale) == (0, 1)
    pixels = (images * 60 + 127).astype(np.float32)
    found, right = encode(modules, torch.from_numpy(pixels)), runtime(path, pixels)
    assert torch.cosine_similarity(found, right).min() > 0.99999


def test_a_neck_from_a_file_trains(tmp_path: Path) -> None:
    modules = load(exported(iresnet(), 32, tmp_path / "r18.onnx"), dropout=0.3)
    modules.neck.train()
    modules.neck(torch.randn(4, *modules.feature_shape)).square().mean().backward()
    assert all(p.grad is not None for p in modules.neck.parameters())
    assert not any(p.requires_grad for p in modules.trunk.parameters())


def test_a_file_of_another_width_than_the_job_states_is_refused(tmp_path: Path) -> None:
    path = exported(iresnet(64), 32, tmp_path / "r18.onnx")
    assert refusal(path, embedding_size=512) == (
        f"{path}: encodings of this file have length 64, not 512; set embedding_size to that of the"
        " file, or use the file that is meant."
    )


def test_a_file_of_another_image_size_than_the_job_states_is_refused(tmp_path: Path) -> None:
    path = exported(iresnet(), 32, tmp_path / "r18.onnx")
    said = refusal(path, input_size=112)
    assert "the file takes images of 32 x 32 pixels, not 112 x 112; set input_size" in said


def test_a_size_that_the_file_leaves_open_must_fit_its_last_layer(tmp_path: Path) -> None:
    path = exported(iresnet(), 32, tmp_path / "r18.onnx", dynamic=True)
    assert load(path, input_size=32).input.size == 32
    said = refusal(path)
    assert "does not take the feature map of an image of 112 x 112 pixels; set input_size" in said


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), "it has no Gemm (linear layer)"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3600, 8)),
            "operator Tanh of node",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 8), nn.Softmax(1)),
            "operator Softmax of node",
        ),
    ],
    ids=["no-gemm", "operator", "after"],
)
def test_a_file_that_is_no_face_network_is_refused_with_a_sentence(
    tmp_path: Path, network: nn.Module, said: str
) -> None:
    assert said in refusal(exported(network.eval(), 32, tmp_path / "net.onnx"))


def test_a_network_for_grey_images_is_refused(tmp_path: Path) -> None:
    graph = onnx.load(exported(iresnet(), 32, tmp_path / "net.onnx"))
    graph.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(graph, tmp_path / "grey.onnx")
    assert "it needs one input of shape (n, 3, size, size)" in refusal(tmp_path / "grey.onnx")


# --- in an ensemble ------------------------------------------------------------------------------


def trains_and_encodes(member: dict[str, Any], folder: Path) -> set[str]:
    """A round changes what is shared and the encodings; returns the shared names."""
    training = TrainingSpec(epochs=1, batch_size=4, variants=1)
    spec = EnsembleSpec(members=(MemberSpec(name="m", training=training, **member),))
    ensemble = build_ensemble(spec, 2, get_registry().with_weights(folder))
    faces = np.random.default_rng(0).integers(0, 256, (6, 112, 112, 3), np.uint8)
    before, start = encode_faces(ensemble, faces, CPU), read_shared_state(ensemble)
    data = TrainingSet(faces, np.arange(6) % 2, 2)
    state, metrics = LocalTrainer(ensemble, data, CPU, 1).run_round(start, 1)
    assert np.isfinite(metrics["m"].loss)
    assert [name for name in state if np.array_equal(state[name], start[name])] == []
    after = encode_faces(ensemble, faces, CPU)
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1, rtol=1e-5)
    assert not np.allclose(before, after, atol=1e-4)
    return set(state)


@pytest.mark.parametrize("trainable", ["neck", "last-stage", "all"])
def test_a_member_from_an_onnx_file_trains_and_encodes(tmp_path: Path, trainable: str) -> None:
    exported(mobile_facenet(64), 32, tmp_path / "mbf.onnx")
    member = {"backbone": "arcface-onnx", "options": {"weights": "mbf.onnx"}}
    names = trains_and_encodes({**member, "trainable": trainable}, tmp_path)
    assert any(name.startswith("m/trunk/") for name in names) == (trainable == "all")
    assert any("last_stage" in name for name in names) == (trainable == "last-stage")


# --- order of colours ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iresnet", "arcface-onnx"])
def test_weights_that_expect_bgr_get_bgr(tmp_path: Path, name: str) -> None:
    path = exported(iresnet(), 32, tmp_path / "r18.onnx")

    def build(channels: Any) -> BackboneModules:
        if name == "arcface-onnx":
            return load(path, channels=channels)
        options = IResNetOptions(depth=18, width=4, input_size=32, channels=channels)
        return IResNet().build(options, 1)

    face = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)
    rgb, bgr = (build(channels) for channels in ("rgb", "bgr"))
    mirrored = to_input(face[..., ::-1], rgb.input, CPU, torch.float32)
    plain = to_input(face, rgb.input, CPU, torch.float32)
    turned = to_input(face, bgr.input, CPU, torch.float32)
    torch.testing.assert_close(encode(bgr, turned), encode(rgb, mirrored))
    assert not torch.allclose(encode(bgr, turned), encode(rgb, plain), atol=1e-3)


def test_another_order_of_colours_is_no_order() -> None:
    with pytest.raises(ValueError, match="'rgb' or 'bgr'"):
        IResNetOptions(channels="grb")  # type: ignore[arg-type]


# --- monai ---------------------------------------------------------------------------------------

needs_monai = pytest.mark.skipif(
    importlib.util.find_spec("monai") is None, reason="the extra `monai` is not installed"
)
RESNET = {"spatial_dims": 2, "n_input_channels": 3, "num_classes": 5}


def monai(seed: int = 1, **changes: Any) -> BackboneModules:
    fields = {"network": "resnet10", "arguments": RESNET, "embedding_size": 8, "input_size": 32}
    return Monai().build(MonaiOptions(**fields | changes), seed)


@needs_monai
def test_random_weights_of_a_monai_network_are_a_function_of_the_seed() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = monai(1), monai(1), monai(2)
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encode(one, images), encode(again, images))
    assert not torch.equal(encode(one, images), encode(other, images))
    assert one.weights_licence == ""
    assert one.feature_shape == (512,)


@needs_monai
def test_a_monai_network_begins_from_a_weights_file_of_any_number_of_classes(
    tmp_path: Path,
) -> None:
    from monai.networks import nets

    torch.manual_seed(0)
    trained = disturbed(nets.resnet10(spatial_dims=2, n_input_channels=3, num_classes=77))
    torch.save(trained.state_dict(), tmp_path / "net.pt")
    modules = monai(weights=tmp_path / "net.pt", weights_licence="MIT")
    assert modules.weights_licence == "MIT"
    images = torch.randn(2, 3, 32, 32)
    trained.fc = nn.Identity()
    with torch.inference_mode():
        torch.testing.assert_close(modules.trunk(images), trained(images))


@needs_monai
def test_weights_of_another_monai_network_are_refused(tmp_path: Path) -> None:
    torch.save(OrderedDict(a=torch.zeros(3)), tmp_path / "net.pt")
    with pytest.raises(ConfigError, match=r"has no tensor 'conv1\.weight' of shape"):
        monai(weights=tmp_path / "net.pt")


@needs_monai
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network": "resnet11"}, "MONAI has no network 'resnet11'; did you mean 'resnet1"),
        ({"network": "torch"}, "MONAI has no network 'torch'"),
        ({"arguments": {"depth": 3}}, "MONAI's resnet10 does not take these arguments:"),
        ({"arguments": {**RESNET, "pretrained": True}}, "MONAI would download weights"),
        (
            {"arguments": {**RESNET, "n_input_channels": 1}},
            "makes no vector of 512 numbers of an RGB image of 32 x 32 pixels",
        ),
        (
            {
                "network": "BasicUNet",
                "arguments": {"spatial_dims": 2, "in_channels": 3, "out_channels": 2},
            },
            "MONAI's BasicUNet has no linear layer at its end; choose a network that classifies",
        ),
    ],
    ids=["name", "no-network", "arguments", "download", "channels", "unet"],
)
def test_what_monai_cannot_do_is_a_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as fault:
        monai(**changes)
    assert said in str(fault.value)


@needs_monai
def test_a_network_that_would_download_by_default_does_not(monkeypatch: Any) -> None:
    from monai.networks import nets

    asked: list[Any] = []

    def eager(pretrained: bool = True) -> nn.Module:
        asked.append(pretrained)
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))

    monkeypatch.setattr(nets, "resnet10", eager)
    assert monai(arguments={}).feature_shape == (3072,)
    assert asked == [False]


@needs_monai
def test_monai_networks_say_of_no_last_stage() -> None:
    assert monai().cut is None


@needs_monai
@pytest.mark.parametrize("trainable", ["neck", "all"])
def test_a_member_from_monai_trains_and_encodes(tmp_path: Path, trainable: str) -> None:
    options = {"network": "resnet10", "arguments": RESNET, "embedding_size": 8, "input_size": 32}
    member = {"backbone": "monai", "options": options, "trainable": trainable}
    trains_and_encodes(member, tmp_path)


def test_without_monai_the_sentence_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(ConfigError) as fault:
        monai()
    assert str(fault.value) == (
        "MONAI is not installed; install it with `pip install 'fedgestalt[monai]'`."
    )
