"""The peers of secure aggregation, called as their own frameworks call them (extra ``peers``).

An environment for them is built by ``make bench-peers``: Flower wants older versions of some of
FLARE's libraries.
"""

from __future__ import annotations

import os
from typing import Final

import numpy as np
import tenseal as ts
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    decrypt as open_box,
)
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    encrypt as seal_box,
)
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)
from numpy.typing import NDArray

CLIPPING_RANGE: Final = 8.0
TARGET_RANGE: Final = 1 << 22
MODULUS: Final = 1 << 32
"""Defaults of ``flwr.server.workflow.SecAggPlusWorkflow``."""

VALUES_PER_CIPHERTEXT: Final = 4096
CIPHERTEXTS: Final = 64


class FlowerClient:
    """What ``flwr.client.mod.secaggplus_mod`` does for one round, with all others as neighbours.

    The order and the calls are those of its ``_setup``, ``_share_keys`` and
    ``_collect_masked_vectors``; what it does for Flower's records and parameters is left out.
    """

    def __init__(self, clients: int, threshold: int) -> None:
        self._clients, self._threshold = clients, threshold
        self._mask_key, mask_public = key_bytes(generate_key_pairs())
        self._box_key, box_public = key_bytes(generate_key_pairs())
        self._public = {0: (mask_public, box_public)}

    def meet(self) -> None:
        """Not timed: the others' keys and their boxes for this client."""
        keys = {i: (generate_key_pairs(), generate_key_pairs()) for i in range(1, self._clients)}
        self._boxes = {}
        for i, ((_, mask_public), (box_key, box_public)) in keys.items():
            self._public[i] = public_key_to_bytes(mask_public), public_key_to_bytes(box_public)
            shared = generate_shared_key(box_key, bytes_to_public_key(self._public[0][1]))
            plain = share_keys_plaintext_concat(i, 0, bytes(52), bytes(260))
            self._boxes[i] = seal_box(shared, plain)

    def share(self) -> list[bytes]:
        """Shares of this client's secrets, sealed for every other client."""
        self._seed = os.urandom(32)
        seed_shares = create_shares(self._seed, self._threshold, self._clients)
        key_shares = create_shares(self._mask_key, self._threshold, self._clients)
        self._shared, boxes = {}, []
        for i, (_, public) in self._public.items():
            if i:
                shared = generate_shared_key(
                    bytes_to_private_key(self._box_key), bytes_to_public_key(public)
                )
                self._shared[i] = shared
                plain = share_keys_plaintext_concat(0, i, seed_shares[i], key_shares[i])
                boxes.append(seal_box(shared, plain))
        return boxes

    def receive(self) -> None:
        """Open the boxes, and agree on a seed with every other client."""
        self._seeds = {}
        for i, box in self._boxes.items():
            share_keys_plaintext_separate(open_box(self._shared[i], box))
            self._seeds[i] = generate_shared_key(
                bytes_to_private_key(self._mask_key), bytes_to_public_key(self._public[i][0])
            )

    def mask(self, update: NDArray[np.float32]) -> list[NDArray[np.int64]]:
        """Quantize and mask, as its defaults are."""
        vectors = parameters_multiply([update], 1.0)
        vectors = quantize(vectors, CLIPPING_RANGE, TARGET_RANGE)
        vectors = factor_combine(TARGET_RANGE, vectors)
        shapes = [vector.shape for vector in vectors]
        vectors = parameters_addition(vectors, pseudo_rand_gen(self._seed, MODULUS, shapes))
        for i, seed in self._seeds.items():
            # Of a client in the middle of the order: it adds as often as it subtracts.
            combine = parameters_subtraction if i % 2 else parameters_addition
            vectors = combine(vectors, pseudo_rand_gen(seed, MODULUS, shapes))
        return parameters_mod(vectors, MODULUS)


def key_bytes(pair: tuple[object, object]) -> tuple[bytes, bytes]:
    """A key pair as bytes, as Flower keeps it."""
    private, public = pair
    return private_key_to_bytes(private), public_key_to_bytes(public)


def ckks_context() -> ts.Context:
    """A client's, as ``nvflare.lighter.impl.he.HEBuilder`` makes it, for one thread."""
    context = ts.context(
        ts.SCHEME_TYPE.CKKS,
        poly_modulus_degree=2 * VALUES_PER_CIPHERTEXT,
        coeff_mod_bit_sizes=[60, 40, 40],
        encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC,
    )
    context.generate_relin_keys()
    context.global_scale = 2**40
    kept = {"save_public_key": True, "save_secret_key": True}
    kept |= {"save_galois_keys": False, "save_relin_keys": True}
    return ts.context_from(context.serialize(**kept), n_threads=1)


def encrypt(context: ts.Context, values: NDArray[np.float32]) -> ts.CKKSVector:
    """As ``nvflare.app_opt.he.HEModelEncryptor`` does."""
    return ts.ckks_vector(context, values * np.float64(100))


def decrypt(context: ts.Context, encrypted: ts.CKKSVector) -> list[float]:
    """As ``nvflare.app_opt.he.HEModelDecryptor`` does."""
    return encrypted.decrypt(secret_key=context.secret_key())
