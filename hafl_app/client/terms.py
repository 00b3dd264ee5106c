"""Terms of a node's operator: the least privacy of a run, and what may leave the node.

Given where the node is started::

    flower-supernode --node-config "least-privacy='local_dp' max-clip-norm=1.0 \
        min-noise-multiplier=1.0 share='losses,times'"

A run that offers less is refused with the reason, and the server leaves the node out. Paths,
repositories and code are `hafl_app.client.permissions`.

With ``central_dp`` the server adds the noise, so the node takes its word for it; only with
``local_dp`` the node clips and adds noise itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from hafl_app.client.node_config import NodeConfigError, positive_number
from hafl_app.client.permissions import NotAllowedError
from hafl_app.config.schema import Settings
from hafl_app.plan import TrainPlan
from hafl_app.training.settings import CLOSED_FORM

LEAST_PRIVACY, MAX_CLIP_NORM, MIN_NOISE = "least-privacy", "max-clip-norm", "min-noise-multiplier"
SHARE: Final = "share"
LABELS, SCORES, IMPORTANCE = "labels", "scores", "importance"
LOSSES, TIMES, DEVICE, SUMS = "losses", "times", "device", "sums"
FIELDS: Final = (LABELS, SCORES, IMPORTANCE, LOSSES, TIMES, DEVICE, SUMS)
"""What a node may withhold; docs/privacy.md says what each is, and what leaves in any case."""

# Each kind with those that promise at least as much.
_ENOUGH = {"none": (), "central_dp": ("central_dp", "local_dp"), "local_dp": ("local_dp",)}


@dataclass(frozen=True)
class Terms:
    """Least privacy of a run, and the fields that may leave a node.

    Parameters
    ----------
    least_privacy
        ``none``, ``central_dp`` or ``local_dp``.
    max_clip_norm
        Largest ``privacy.clip_norm``, above 0; None: any.
    min_noise_multiplier
        Smallest ``privacy.noise_multiplier``, above 0; None: any.
    shared
        Of `FIELDS`.
    """

    least_privacy: str = "none"
    max_clip_norm: float | None = None
    min_noise_multiplier: float | None = None
    shared: frozenset[str] = frozenset(FIELDS)

    @classmethod
    def of(cls, node_config: Mapping[str, Any]) -> "Terms":
        """Read a node config; without any of the keys everything may leave, at any privacy.

        Raises
        ------
        NodeConfigError
            If a value is malformed, or a bound has no ``least-privacy``: a node must not answer
            on other terms than intended.
        """
        kind = str(node_config.get(LEAST_PRIVACY, "none")).strip()
        if kind not in _ENOUGH:
            raise NodeConfigError(LEAST_PRIVACY, f"one of {', '.join(_ENOUGH)}", kind)
        bounds = {key: positive_number(node_config, key) for key in (MAX_CLIP_NORM, MIN_NOISE)}
        for key, bound in bounds.items():
            if bound is not None and kind == "none":
                raise NodeConfigError(key, f"a {LEAST_PRIVACY} that it is a bound of", bound)
        return cls(kind, bounds[MAX_CLIP_NORM], bounds[MIN_NOISE], _shared(node_config.get(SHARE)))

    def shares(self, field: str) -> bool:
        """Return whether one of `FIELDS` may leave."""
        return field in self.shared

    def check(self, settings: Settings) -> None:
        """Refuse a run that offers less privacy, or cannot do without a withheld field.

        Raises
        ------
        NotAllowedError
            In one line: the setting, its value, and the key that forbids it.
        """
        self._check_privacy(settings)
        if settings.federation.fraction_evaluate > 0 and not self.shares(SCORES):
            asked = f"federation.fraction_evaluate={settings.federation.fraction_evaluate}"
            raise _withheld(asked, SCORES)
        if settings.federation.scaffold and not self.shares(TIMES):
            raise _withheld("federation.scaffold=true", TIMES)
        if settings.model.head == CLOSED_FORM and not self.shares(SUMS):
            raise _withheld(f"model.head={CLOSED_FORM}", SUMS)
        if settings.model.asks_for_losses and not self.shares(SCORES):
            raise _withheld("model.closed_form.temperature_by=clients", SCORES)
        if settings.devices.classes and not self.shares(TIMES):
            raise _withheld("devices", TIMES)
        if settings.strategy.traits.uploads_importance and not self.shares(IMPORTANCE):
            raise _withheld("the strategy", IMPORTANCE)

    def check_plan(self, plan: TrainPlan) -> None:
        """Refuse a plan that asks for a withheld field, whatever the settings said.

        Raises
        ------
        NotAllowedError
            See `check`.
        """
        measures = plan.importance != "none" or plan.choice is not None
        if measures and not self.shares(IMPORTANCE):  # a choice tells which components score best
            raise _withheld("the plan", IMPORTANCE)

    def check_field(self, field: str, asked: str) -> None:
        """Refuse a request for one of `FIELDS` that may not leave.

        Parameters
        ----------
        asked
            What needs it, in words.

        Raises
        ------
        NotAllowedError
            See `check`.
        """
        if not self.shares(field):
            raise _withheld(asked, field)

    def _check_privacy(self, settings: Settings) -> None:
        if self.least_privacy == "none":
            return
        offered = settings.privacy
        if offered.kind not in _ENOUGH[self.least_privacy]:
            raise _too_little(f"kind={offered.kind}", self.least_privacy, LEAST_PRIVACY)
        if offered.noise_seed is not None:
            raise _too_little("noise_seed", "null, noise that cannot be computed", LEAST_PRIVACY)
        most, least = self.max_clip_norm, self.min_noise_multiplier
        if most is not None and offered.clip_norm > most:
            raise _too_little(f"clip_norm={offered.clip_norm}", f"at most {most}", MAX_CLIP_NORM)
        if least is not None and offered.noise_multiplier < least:
            given = f"noise_multiplier={offered.noise_multiplier}"
            raise _too_little(given, f"at least {least}", MIN_NOISE)


def _shared(value: Any) -> frozenset[str]:
    if value is None:
        return frozenset(FIELDS)
    named = frozenset(part.strip() for part in str(value).split(",") if part.strip())
    if named - set(FIELDS):
        raise NodeConfigError(SHARE, f"some of {', '.join(FIELDS)}, separated by commas", value)
    return named


def _too_little(offered: str, wanted: str, key: str) -> NotAllowedError:
    return NotAllowedError(
        f"privacy.{offered}: this node insists on {wanted} ({key} in its --node-config)"
    )


def _withheld(asked: str, field: str) -> NotAllowedError:
    return NotAllowedError(
        f"{asked} needs the {field} of this node, which {SHARE} in its --node-config withholds"
    )
