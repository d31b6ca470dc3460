"""What the jobs of a consortium would ask of this site: disk, memory and bytes on the wire.

All figures follow from the default training job, the installed backbones and the number of images
here; nothing is measured. See :mod:`fedgestalt.doctor.dry_run` for times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from fedgestalt.cohort import Cohort
from fedgestalt.contracts import FACE_SIZE
from fedgestalt.federation.training.checkpoints import MODELS_KEPT
from fedgestalt.federation.training.model import Optimiser, ServerStep
from fedgestalt.federation.training.rounds import (
    Aggregation,
    Rule,
    Scope,
    exponents_of,
    first_ranges,
    number_plan,
    shapes_of,
)
from fedgestalt.jobs import TrainingJob
from fedgestalt.learning.augment import TEST_VARIANTS
from fedgestalt.learning.device import trunk_dtype
from fedgestalt.learning.ensemble import Ensemble, read_shared_state
from fedgestalt.secagg import Recipient, ThreatModel

PROCESS_BYTES: Final = 900 << 20
"""A job's process with torch, FLARE and a small ensemble; measured 0.7 GiB with the default one."""

_FACE_BYTES: Final = FACE_SIZE * FACE_SIZE * 3
_STATES: Final = 8
"""Copies of the trained values at once: model, gradients, two of Adam, old, new, update, words."""


@dataclass(frozen=True)
class Work:
    """The sizes of one site's part.

    Attributes:
        images, training_images: of this site.
        values: trained values of the model.
        words: 32-bit words of one masked update.
        feature_bytes: files of the feature cache, for training and for matching.
        model_bytes: one stored ensemble.
        memory_bytes: of the job's process.
        encoding_size: length of an image's vector.
    """

    images: int
    training_images: int
    values: int
    words: int
    feature_bytes: int
    model_bytes: int
    memory_bytes: int
    encoding_size: int

    @property
    def disk_bytes(self) -> int:
        """What a training and a matching job leave in the store, with the last rounds' models."""
        return self.feature_bytes + (1 + MODELS_KEPT) * self.model_bytes

    @property
    def sent_per_round(self) -> int:
        """Bytes of one masked update."""
        return 4 * self.words

    @property
    def received_per_round(self) -> int:
        """Bytes of the sum of all updates."""
        return 4 * self.words

    @property
    def masked_rows_bytes(self) -> int:
        """Bytes of all masked vectors in a matching job."""
        return 8 * self.images * self.encoding_size


def work_of(job: TrainingJob, ensemble: Ensemble, cohort: Cohort, device: torch.device) -> Work:
    """The sizes of ``job``, and of matching with its ensemble, for the images of ``cohort``."""
    images, training = len(cohort.images), len(cohort.train)
    state = read_shared_state(ensemble)
    aggregation = Aggregation(
        Scope(job.scope),
        Rule(job.rule),
        Recipient(job.reveal_aggregate_to),
        ThreatModel(job.threat_model),
        job.max_images_per_site,
        ServerStep(Optimiser(job.server_optimiser), job.server_learning_rate, job.server_momentum),
    )
    shared = aggregation.shared(state, ensemble.spec)
    exponents = exponents_of(first_ranges(shared, ensemble.spec))
    plan = number_plan(
        shapes_of(shared),
        exponents,
        job.minimum_sites,
        aggregation,
        ensemble.spec,
        ensemble.classes,
    )
    values = sum(int(array.size) for array in state.values())
    item = trunk_dtype(device).itemsize
    frozen = [member for member in ensemble.members if member.trunk_is_frozen]
    trained = [member for member in frozen if member.trained_parts]
    to_train = sum(m.spec.training.variants * math.prod(m.feature_shape) for m in trained)
    trunks = {member.trunk_digest: math.prod(member.feature_shape) for member in frozen}
    to_encode = len(TEST_VARIANTS) * sum(trunks.values())
    variants = max((m.spec.training.variants for m in trained), default=0)
    copies = max(training * (1 + variants), images * (1 + len(TEST_VARIANTS)))
    fixed = sum(p.numel() for member in ensemble.members for p in member.parameters()) * 4
    return Work(
        images=images,
        training_images=training,
        values=values,
        words=plan.words,
        feature_bytes=item * (training * to_train + images * to_encode),
        model_bytes=4 * values,
        memory_bytes=PROCESS_BYTES + fixed + _STATES * 4 * values + copies * _FACE_BYTES,
        encoding_size=ensemble.encoding_size,
    )


def traffic(job: TrainingJob, work: Work) -> dict[str, int]:
    """Bytes that a training and a matching job move, as far as this site alone determines them.

    A site sends its masked update and receives the sum of all updates each round; it builds the
    start model itself. In a matching job it sends a vector for each image.
    """
    return {
        "sent_bytes_per_round": work.sent_per_round,
        "sent_bytes": work.sent_per_round * job.rounds,
        "received_bytes_per_round": work.received_per_round,
        "received_bytes": work.received_per_round * job.rounds,
        "matching_sent_bytes": work.masked_rows_bytes,
    }
