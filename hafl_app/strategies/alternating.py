"""The factor whose turn it is, in methods that train one factor in each round."""

from hafl_app.plan_parts.module_plan import TrainedFactors


def factor_of_round(server_round: int) -> TrainedFactors:
    """Return ``B`` in odd rounds and ``A`` in even ones.

    lora_B comes first: while it is 0, lora_A has no gradient.

    Parameters
    ----------
    server_round
        From 1.
    """
    return "B" if server_round % 2 else "A"
