"""Settings of the closed-form head."""

from dataclasses import dataclass

from hafl_app.fields import choice, number


@dataclass(frozen=True)
class ClosedFormSettings:
    """The head under ``model.head=closed_form``, see docs/closed_form_head.md.

    Parameters
    ----------
    rule
        ``ridge`` regression on standardized features, or ``class_means``: nearest class mean, for
        which a client sends one vector a class.
    ridge
        Strength of the ridge regression, in units of the number of examples. Null: chosen, see
        ``ridge_by``.
    ridge_by
        How the strength is chosen: ``gcv``, generalized cross-validation from the same sums, or
        ``validation``: by the cross entropy on the server's validation data.
    temperature
        Divisor of the solved head's logits, for the cross entropy of training. Null: chosen, see
        ``temperature_by``.
    temperature_by
        How the temperature is chosen: by the cross entropy on the server's ``validation`` data, or
        by that of the ``clients`` on the rows that they hold out, which is one more exchange.
    trained
        Whether clients train the head from there, and the server averages it. False: it stays as
        it was solved.
    feature_limit
        Root mean square that the features of an example are scaled down to if it is larger: the
        most that an example counts.
    projection
        Features that a random projection leaves, for wide encoders; null, or as many as there are:
        none is made.
    numbers
        Numbers that the sums are uploaded in: ``fp32`` or ``fp64``.
    per_rank
        Whether the head is solved once more after the last round, for each rank of the clients
        that is smaller than the adapter's: from the features under the adapter cut to it. That is
        one more exchange a rank. False: a device of any rank uses the whole adapter's head.
    """

    rule: str = choice("ridge", "ridge", "class_means")
    ridge: float | None = number(None, above=0)
    ridge_by: str = choice("gcv", "gcv", "validation")
    temperature: float | None = number(None, above=0)
    temperature_by: str = choice("validation", "validation", "clients")
    trained: bool = False
    feature_limit: float = number(4.0, above=0)
    projection: int | None = number(None, at_least=1)
    numbers: str = choice("fp32", "fp32", "fp64")
    per_rank: bool = False

    @property
    def asks_for_moments(self) -> bool:
        """Whether clients send ``sum x x^T``."""
        return self.rule == "ridge"

    @property
    def chooses_on_validation(self) -> bool:
        """Whether anything is chosen on the server's validation data."""
        ridge = self.asks_for_moments and self.ridge is None and self.ridge_by == "validation"
        return ridge or (self.temperature is None and self.temperature_by == "validation")

    @property
    def asks_for_losses(self) -> bool:
        """Whether clients say which temperature fits their held-out rows."""
        return self.temperature is None and self.temperature_by == "clients"

    def size(self, width: int) -> int:
        """Return how many features are summed up, of an encoder with ``width``."""
        return min(self.projection or width, width)

    def projects(self, width: int) -> bool:
        """Whether the features of an encoder with ``width`` are projected."""
        return self.size(width) < width

    def most_norm(self, width: int) -> float:
        """Return the L2 norm that no example's features exceed."""
        return float(self.feature_limit * width**0.5)
