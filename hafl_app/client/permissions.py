"""Permissions of a node: the local paths, hub names and model code that a server may use.

The run config comes from the server and names the files that a node reads and the repositories
that it loads. A node therefore keeps to its own list, given where it is started::

    flower-supernode --node-config "partition-id=0 num-partitions=2 \
        allowed-paths='/data:/models' allowed-models='org/encoder' allow-remote-code=true"

Without a list no local path is read, no foreign code runs, and only what `conf/` names is taken
from the hub, at the revisions that `conf/` names. Nodes that are not started one by one, those of
a simulation, take the same from environment variables: ``HAFL_ALLOWED_PATHS`` and so on.

This holds against a run config, not against other program code: which app a node runs is settled
by its operator, in Flower with ``flower-supernode --trusted-entities``.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hafl_app.client.node_config import NodeConfigError
from hafl_app.config.files import files_of
from hafl_app.config.schema import Settings
from hafl_app.training.chat_templates import CHAT_TEMPLATES

PATHS, MODELS, DATASETS = "allowed-paths", "allowed-models", "allowed-datasets"
REMOTE_CODE = "allow-remote-code"
_ALL = "*"


def variable(key: str) -> str:
    """Return the environment variable equivalent to a key of the node config."""
    return f"HAFL_{key.upper().replace('-', '_')}"


ERROR_DETAILS = variable("allow-error-details")
"""Environment variable of simulated nodes: ``true`` lets their error replies name files and rows of
the run's own data set."""

OWN_MACHINE = {variable(key): _ALL for key in (PATHS, MODELS, DATASETS)} | {
    variable(REMOTE_CODE): "true",
    ERROR_DETAILS: "true",
}
"""Environment of nodes whose user starts the run: the files are that user's own."""


def spelled_out(node_config: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return a node config with the permissions of an environment written into it.

    For a message that is answered in another process, whose environment differs.
    """
    keys = (PATHS, MODELS, DATASETS, REMOTE_CODE)
    added = {key: environ[variable(key)] for key in keys if variable(key) in environ}
    return {**added, **node_config}


class NotAllowedError(ValueError):
    """A setting that this node's operator has not allowed; the message is one line."""


@dataclass(frozen=True)
class Permissions:
    """Paths, repositories and code that a node allows.

    Parameters
    ----------
    paths
        Absolute folders and files, links resolved; what lies below them may be read. ``*``: all.
    models, datasets
        Names of hub repositories, ``owner/name`` for any revision and ``owner/name@revision`` for
        one; among the models also ``package/folder`` of an installed package. ``*``: all.
    remote_code
        Whether a model's own Python code may run.
    """

    paths: tuple[str, ...]
    models: frozenset[str]
    datasets: frozenset[str]
    remote_code: bool

    @classmethod
    def of(cls, node_config: Mapping[str, Any], environ: Mapping[str, str]) -> "Permissions":
        """Read a node's permissions; its config goes before its environment.

        Parameters
        ----------
        node_config
            ``allowed-paths`` separated as in PATH, ``allowed-models`` and ``allowed-datasets`` by
            commas, and ``allow-remote-code``. A list replaces the default, an empty one allows
            nothing.
        environ
            The same under the names that `variable` gives.

        Raises
        ------
        hafl_app.client.node_config.NodeConfigError
            If a list is malformed: a node must not answer with other permissions than intended.
        """
        given = {
            key: node_config.get(key, environ.get(variable(key)))
            for key in (PATHS, MODELS, DATASETS, REMOTE_CODE)
        }
        return cls(
            paths=tuple(_allowed_path(part) for part in _parts(given[PATHS], os.pathsep)),
            models=_names(given[MODELS], shipped_models()),
            datasets=_names(given[DATASETS], shipped_datasets()),
            remote_code=_switch(given[REMOTE_CODE]),
        )

    def check(self, settings: Settings) -> None:
        """Reject settings that name a path, a repository or code that is not allowed.

        Raises
        ------
        NotAllowedError
            In one line: the setting, its value, and the key that would allow it.
        """
        dataset, model = settings.dataset, settings.model
        self._check_path("dataset.path", dataset.path)
        self._check_path("dataset.test_path", dataset.test_path)
        _check_name("dataset.hub", dataset.hub, dataset.revision, DATASETS, self.datasets)
        if model.path.startswith((os.sep, ".", "~")):
            self._check_path("model.path", model.path)
        else:
            _check_name("model.path", model.path, model.revision, MODELS, self.models)
        _check_name("model.package_path", model.package_path, None, MODELS, self.models)
        if model.trust_remote_code and not self.remote_code:
            raise _refused("model.trust_remote_code", "true", REMOTE_CODE)
        template = model.chat_template
        if template and template not in CHAT_TEMPLATES and not self.remote_code:
            # It would be a program of the run's that reads this node's rows.
            raise _refused("model.chat_template", f"{template[:20]}...", REMOTE_CODE)

    def _check_path(self, setting: str, path: str | None) -> None:
        if not path or _ALL in self.paths:
            return
        if not Path(path).is_absolute():
            raise NotAllowedError(f"{setting}={path!r}: a node takes absolute paths only")
        # Resolved: neither `..` nor a link leads out of the allowed folders.
        real = Path(path).resolve()
        if not any(real.is_relative_to(allowed) for allowed in self.paths):
            raise _refused(setting, path, PATHS)


def shows_details(environ: Mapping[str, str], *, has_own_data: bool) -> bool:
    """Say whether a node's errors may quote its files: its user's own, as the run names them.

    Never for a node with data of its own.
    """
    return environ.get(ERROR_DETAILS) == "true" and not has_own_data


@contextmanager
def own_machine() -> Iterator[None]:
    """Allow the nodes of this process everything, except where its environment says otherwise.

    For runs that a user starts and computes on one machine, with files of that user's own.
    """
    added = {name: value for name, value in OWN_MACHINE.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@functools.cache
def shipped_models() -> frozenset[str]:
    """Return the base models of `conf/`: hub names with revision, and folders of packages."""
    files = _files("model")
    packages = {str(values["package_path"]) for values in files if values.get("package_path")}
    return _repositories(files, "path") | packages


@functools.cache
def shipped_datasets() -> frozenset[str]:
    """Return the data sets of `conf/`: hub names with revision."""
    return _repositories(_files("dataset"), "hub")


def _files(group: str) -> list[dict[str, Any]]:
    loaded = [OmegaConf.load(path) for path in files_of(group)]
    return [OmegaConf.to_container(values) for values in loaded]  # type: ignore[misc]


def _repositories(files: list[dict[str, Any]], key: str) -> frozenset[str]:
    named = [(values.get(key), values.get("revision")) for values in files]
    return frozenset(
        f"{name}@{revision}" if revision else str(name)
        for name, revision in named
        if name and name != "???"
    )


def _check_name(
    setting: str, name: str | None, revision: str | None, key: str, allowed: frozenset[str]
) -> None:
    if name and not {_ALL, name, f"{name}@{revision}"} & allowed:
        raise _refused(setting, f"{name}@{revision}" if revision else name, key)


def _refused(setting: str, value: str, key: str) -> NotAllowedError:
    return NotAllowedError(
        f"{setting}={value!r}: this node does not allow it, {key} in its --node-config would (in a "
        f"simulation: {variable(key)} in the environment in which the SuperLink starts)"
    )


def _parts(value: Any, separator: str) -> list[str]:
    text = "" if value is None else str(value)
    return [part.strip() for part in text.split(separator) if part.strip()]


def _names(value: Any, default: frozenset[str]) -> frozenset[str]:
    return default if value is None else frozenset(_parts(value, ","))


def _allowed_path(part: str) -> str:
    path = Path(part).expanduser()
    if part != _ALL and not path.is_absolute():
        raise NodeConfigError(PATHS, "absolute paths", part)
    return part if part == _ALL else str(path.resolve())


def _switch(value: Any) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False, "": False, "none": False}
    word = str(value).strip().lower()
    if word not in words:
        raise NodeConfigError(REMOTE_CODE, "true or false", value)
    return words[word]
