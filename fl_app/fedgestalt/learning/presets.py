"""Settings of training jobs that somebody has published, by name.

The papers aggregate every 5 of 50 epochs: 10 rounds of 5. Sizes of batches, rates and decays are
theirs (GestaltMatcher-Arc; Federated GestaltMatcher, arXiv 2509.10635), and so is the loss, a
cross-entropy with class weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec

_GLINT_LICENCE: Final = "LicenseRef-InsightFace-noncommercial"
"""The weights may be used for non-commercial research only; a site must allow it by this name."""

_M0 = TrainingSpec(
    epochs=5,
    batch_size=64,
    learning_rate=5e-4,
    head_learning_rate=1e-3,
    weight_decay=5e-5,
    head_weight_decay=5e-4,
    dropout=0.5,
)
_M1 = _M0.model_copy(update={"batch_size": 128, "learning_rate": 1e-3, "weight_decay": 0.0})


def _members(backbone: str, r50: Mapping[str, Any], r100: Mapping[str, Any]) -> EnsembleSpec:
    return EnsembleSpec(
        members=(
            MemberSpec(name="m0", backbone=backbone, options=dict(r50), training=_M0),
            MemberSpec(name="m1", backbone=backbone, options=dict(r100), training=_M1),
            MemberSpec(name="m2", backbone=backbone, options=dict(r100), trainable="none"),
        )
    )


def _gestaltmatcher() -> dict[str, Any]:
    def file(name: str) -> dict[str, Any]:
        return {"weights": name, "weights_licence": _GLINT_LICENCE, "embedding_size": 512}

    members = _members("arcface-onnx", file("glint360k_r50.onnx"), file("glint360k_r100.onnx"))
    return {"ensemble": members, "rounds": 10}


def _rehearsal() -> dict[str, Any]:
    members = _members("iresnet", {"depth": 50}, {"depth": 100})
    return {"ensemble": members, "rounds": 10}


PRESETS: Final[Mapping[str, Callable[[], dict[str, Any]]]] = {
    "gestaltmatcher": _gestaltmatcher,
    "gestaltmatcher-rehearsal": _rehearsal,
}
"""Fields of the training job, by name of the preset.

``gestaltmatcher``: the papers' three members, from the sites' own ArcFace files.
``gestaltmatcher-rehearsal``: networks of the same sizes with random weights, to try out time,
memory and traffic without these files; it learns little.
"""
