"""Masks that cancel in a sum: secure aggregation of changes, on NumPy arrays.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017,
on whole numbers modulo 2^32. Key exchange, secret sharing and encryption are Flower's primitives.
Masks are not: `flwr.common.secure_aggregation.secaggplus_utils.pseudo_rand_gen` folds a key into 32
bits and draws from a Mersenne Twister, so that whoever sees a masked vector could try all keys.

A vector is a mapping of *pieces*: a client's row of a lora_A, column of a lora_B, tensor of the
head, or own weight, each under a name. A pair of clients masks the pieces that both of them upload,
so that clients of different rank take part in one sum, and each pays for its own pieces alone.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.supercore.primitives.asymmetric import bytes_to_public_key
from numpy.typing import NDArray

FEWEST_MEMBERS = 3
"""Clients behind every number of a sum: of two, each would know the other's from the result."""

Names = frozenset[str]
Values = Mapping[str, NDArray[np.float64]]
Masked = Mapping[str, NDArray[np.uint32]]

_KEY_BYTES = 48  # of a private key on SECP384R1
_LARGEST = 2**31 - 1


class SecureSumError(ValueError):
    """A secure sum that cannot be made or opened, with the reason in one line."""


def check_members(members: Iterable[Names]) -> None:
    """Refuse a sum in which a piece would be added up over fewer than three clients.

    Raises
    ------
    SecureSumError
        Naming the piece and how many there are.
    """
    counts = Counter(name for names in members for name in names)
    if few := sorted(name for name, count in counts.items() if count < FEWEST_MEMBERS):
        raise SecureSumError(
            f"{few[0]} would be summed over {counts[few[0]]} clients, expected at least "
            f"{FEWEST_MEMBERS}"
        )


# ---- whole numbers -------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounding:
    """Changes as whole numbers whose sum over all members stays below 2^31.

    Parameters
    ----------
    largest
        Largest number that a client may add, above 0.
    members
        Clients of the sum, at least 1.
    """

    largest: float
    members: int

    @property
    def step(self) -> float:
        """What one whole number stands for; a client's error is at most half of it."""
        return self.largest / (_LARGEST // self.members)

    def encode(self, values: Values, shares: Mapping[str, float]) -> dict[str, NDArray[np.uint32]]:
        """Return ``round(share * values / step)`` modulo 2^32.

        Parameters
        ----------
        shares
            Weight of the client in each piece, at least 0.

        Raises
        ------
        SecureSumError
            If a number is not finite, or above ``largest``, by itself or times its share.
        """
        encoded = {}
        for name, piece in values.items():
            share = shares[name]
            if not max(share, 1.0) * np.abs(piece).max(initial=0.0) <= self.largest:  # also NaN
                raise SecureSumError(
                    f"{name} adds more than privacy.largest_change={self.largest:g} to the sum, "
                    "above which whole numbers would overflow"
                )
            encoded[name] = np.rint(share * piece / self.step).astype(np.int64).astype(np.uint32)
        return encoded

    def decode(self, total: Masked) -> dict[str, NDArray[np.float64]]:
        """Return the sum of ``share * values`` that an unmasked sum stands for."""
        return {
            n: piece.view(np.int32).astype(np.float64) * self.step for n, piece in total.items()
        }


# ---- masks ---------------------------------------------------------------------------------


def mask(seed: bytes, name: str, length: int) -> NDArray[np.uint32]:
    """Return a piece's mask: uniform for whoever does not know the seed, from SHAKE-256."""
    digest = hashlib.shake_256(len(seed).to_bytes(4, "little") + seed + name.encode())
    return np.frombuffer(digest.digest(4 * length), "<u4")


def add_mask(vector: dict[str, NDArray[np.uint32]], seed: bytes, names: Names, sign: int) -> None:
    """Add a mask to the pieces of these names, or take it off, modulo 2^32.

    Parameters
    ----------
    sign
        1 or -1.
    """
    for name in names & vector.keys():
        piece, own = vector[name], mask(seed, name, len(vector[name]))
        vector[name] = piece + own if sign > 0 else piece - own


def pair_sign(node_id: int, other_id: int) -> int:
    """Return the sign with which a client adds the mask that it shares with another one."""
    return 1 if node_id < other_id else -1


def shared_seed(private_key: ec.EllipticCurvePrivateKey, public_key: bytes) -> bytes:
    """Return the secret that two clients share: of the key of one and the public key of the other.

    Raises
    ------
    SecureSumError
        If the public key is none.
    """
    try:
        return generate_shared_key(private_key, bytes_to_public_key(public_key))
    except (ValueError, TypeError, AttributeError) as error:
        raise SecureSumError("a public key cannot be read") from error


def key_bytes(private_key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key's number, a third of the bytes of Flower's form: it is shared out."""
    return private_key.private_numbers().private_value.to_bytes(_KEY_BYTES, "big")


def key_of(secret: bytes) -> ec.EllipticCurvePrivateKey:
    """Return the private key of `key_bytes`.

    Raises
    ------
    SecureSumError
        If it is none: shares that do not belong together make another number.
    """
    try:
        return ec.derive_private_key(int.from_bytes(secret, "big"), ec.SECP384R1())
    except ValueError as error:
        raise SecureSumError("the shares of a key do not belong together") from error
