"""Authenticate a node's call by its headers alone, before a byte of its body is read.

Flower's nodes sign each call's timestamp; key, timestamp and signature travel in headers. The
SuperLink checks them as well, but only after it has read the whole body into memory.
"""

import binascii
import json
from base64 import b64decode
from collections.abc import Mapping
from datetime import UTC, datetime

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from starlette.exceptions import HTTPException

from hafl_app.deployment.registered_keys import RegisteredKeys, SuperlinkSilentError

NOT_AUTHENTICATED = "Invalid SuperNode authentication"
"""Answer to a rejected call, as from the SuperLink; the log has the reason."""

NOT_REGISTERED = json.dumps({"code": 2004, "detail": "Failed to activate SuperNode."})
"""Answer to an unregistered node, as from the SuperLink, with status 412: it then ends as failed,
and its service manager tries again. After a 401 it would end as if all were well."""

_LONGEST_HEADER = 1024  # a public key on P-521 has 360 characters


class SignatureError(ValueError):
    """Headers that no registered node signed just now."""


def signing_key(headers: Mapping[str, str], now: datetime) -> bytes:
    """Return the public key (PEM) whose owner signed these headers within the last minutes.

    The window is Flower's own: 300 s back, and its tolerance for clocks that differ.

    Parameters
    ----------
    now
        With a time zone.

    Raises
    ------
    SignatureError
        If a header is missing, malformed or too long, the time is not now, or the signature is
        not the key's.
    """
    try:
        key = b64decode(_short(headers, FLEET_HTTP_PUBLIC_KEY_HEADER), validate=True)
        signature = b64decode(_short(headers, FLEET_HTTP_SIGNATURE_HEADER), validate=True)
        timestamp = _short(headers, TIMESTAMP_HEADER)
        age = (now - datetime.fromisoformat(timestamp)).total_seconds()
        public_key = bytes_to_public_key(key)
        message = timestamp.encode("ascii")
    except (ValueError, TypeError, UnsupportedAlgorithm, binascii.Error) as error:
        raise SignatureError("malformed signature headers") from error
    if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
        raise SignatureError(f"signed {age:.0f} s ago by this machine's clock")
    if not isinstance(public_key, ec.EllipticCurvePublicKey):
        raise SignatureError("a key of another kind than Flower's nodes have")
    if not verify_signature(public_key, message, signature):
        raise SignatureError("the signature is not the key's")
    return key


async def authenticated_key(headers: Mapping[str, str], registered: RegisteredKeys) -> bytes:
    """Return the public key of the registered node that makes a call.

    Raises
    ------
    starlette.exceptions.HTTPException
        401 if no node signed it; 412 if one did that is not registered; 502, on which nodes try
        again, if the SuperLink is silent.
    """
    try:
        key = signing_key(headers, datetime.now(UTC))
        known = await registered.include(key)
    except SignatureError as error:
        raise HTTPException(401, NOT_AUTHENTICATED) from error
    except SuperlinkSilentError as error:
        raise HTTPException(502, str(error)) from error
    if not known:
        raise HTTPException(412, NOT_REGISTERED) from SignatureError("the key is not registered")
    return key


def _short(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name)
    if value is None or len(value) > _LONGEST_HEADER:
        raise SignatureError(f"header {name} is missing or longer than {_LONGEST_HEADER}")
    return value
