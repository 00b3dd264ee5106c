"""Public keys of registered nodes, read from the SuperLink on the operator's side of the fence."""

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.proto.control_pb2 import ListNodesRequest, ListNodesResponse
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from google.protobuf.message import DecodeError

_TIMEOUT = httpx.Timeout(60.0)
# The SuperLink closes idle connections after 5 s; one that it is closing must not be used again.
_LIMITS = httpx.Limits(max_connections=None, keepalive_expiry=2.0)
_UNREGISTERED = "unregistered"
_ANSWER_SECONDS = 10.0
_BELIEVED_SECONDS = 60.0
_BETWEEN_QUESTIONS_SECONDS = 1.0


class SuperlinkSilentError(RuntimeError):
    """The SuperLink did not say which keys are registered."""


@dataclass(frozen=True)
class RegisteredNode:
    """A node as the SuperLink lists it.

    Parameters
    ----------
    node_id
        Flower's id of it.
    name
        As its operator registered it; may be empty.
    """

    node_id: int
    name: str


class RegisteredKeys:
    """Public keys of the registered nodes, as the SuperLink lists them.

    A list is believed for a minute. A key that is not in it is asked for again, at most once a
    second for all callers together, so that a node may come as soon as it is registered.

    Parameters
    ----------
    ask
        Asks the SuperLink.
    clock
        Seconds, monotonic.

    Attributes
    ----------
    nodes
        Registered nodes by key, as of the last answer.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[Mapping[bytes, RegisteredNode]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._asking = asyncio.Lock()
        self.nodes: Mapping[bytes, RegisteredNode] = {}
        self._asked_at = float("-inf")
        self._silent: SuperlinkSilentError | None = None

    async def include(self, key: bytes) -> bool:
        """Whether a key is registered.

        Raises
        ------
        SuperlinkSilentError
            If the SuperLink does not answer.
        """
        arrived = self._clock()
        believed = self._silent is None and arrived - self._asked_at < _BELIEVED_SECONDS
        if believed and key in self.nodes:
            return True
        async with self._asking:
            if self._asked_at < arrived:  # else another caller asked for all who were waiting
                await self._ask_again()
        if self._silent is not None:
            raise SuperlinkSilentError(str(self._silent)) from self._silent
        return key in self.nodes

    async def _ask_again(self) -> None:
        pause = self._asked_at + _BETWEEN_QUESTIONS_SECONDS - self._clock()
        await asyncio.sleep(max(0.0, pause))
        asked_at = self._clock()
        try:
            self.nodes, self._silent = await self._ask(), None
        except SuperlinkSilentError as error:
            self._silent = error
        self._asked_at = asked_at


def keys_of_superlink(
    client: httpx.AsyncClient,
) -> Callable[[], Awaitable[Mapping[bytes, RegisteredNode]]]:
    """Return a function that reads the registered nodes from a SuperLink, behind the fence.

    Parameters
    ----------
    client
        Its base URL is the SuperLink's.
    """

    async def ask() -> Mapping[bytes, RegisteredNode]:
        try:
            reply = await client.post(
                "/v1/control/list-nodes",
                content=ListNodesRequest().SerializeToString(),
                headers={"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE},
                timeout=_ANSWER_SECONDS,
            )
            reply.raise_for_status()
            nodes = ListNodesResponse.FromString(reply.content).nodes_info
        except (httpx.HTTPError, DecodeError) as error:
            raise SuperlinkSilentError(f"SuperLink: {type(error).__name__}") from error
        return {
            node.public_key: RegisteredNode(node.node_id, node.name)
            for node in nodes
            if node.status != _UNREGISTERED
        }

    return ask


def superlink_client(
    superlink: str, ca: Path | None, transport: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """Return a client of the SuperLink on the loopback.

    Parameters
    ----------
    superlink
        Its address, host:port.
    ca
        Certificate authority to check it by.
    transport
        Transport to it, if not the network.
    """
    return httpx.AsyncClient(
        base_url=f"https://{superlink}",
        verify=ssl.create_default_context(cafile=ca) if ca else True,
        timeout=_TIMEOUT,
        limits=_LIMITS,
        transport=transport,
        trust_env=False,  # a proxy of the environment is not the way to the loopback
    )
