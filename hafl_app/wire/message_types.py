"""Types of messages beside Flower's own: a category of Flower's and an action of this app.

Imports nothing: a SuperNode starts a process for every message, which reads them.
"""

FEATURE_SUMS = "feature_sums"
"""Action of a query for the sums of a node's features."""

TEMPERATURE_LOSSES = "temperature_losses"
"""Action of an evaluation at several temperatures of the head."""

ANSWERS = "answers"
"""Action of an evaluation by answers that the node writes."""

QUERY_FEATURE_SUMS = f"query.{FEATURE_SUMS}"
EVALUATE_TEMPERATURES = f"evaluate.{TEMPERATURE_LOSSES}"
EVALUATE_ANSWERS = f"evaluate.{ANSWERS}"
