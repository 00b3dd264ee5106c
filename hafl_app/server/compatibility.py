"""Check a method's declared traits against the run's settings."""

from collections.abc import Iterable, Sequence

from hafl_app.plan import TrainPlan
from hafl_app.privacy.mechanism import PrivacyError, check_local_plan
from hafl_app.server.method import Division, Method, StrategyError, Traits
from hafl_app.wire.node_profile import NodeProfile, matches


def check_method(method: Method, ranks: Sequence[int]) -> None:
    """Refuse a federation of these rank budgets, or settings that the method cannot honor.

    Raises
    ------
    StrategyError
        With the reason.
    """
    name = _name(method)
    if min(ranks, default=1) < 1:
        raise StrategyError(f"a client has rank {min(ranks)}, expected at least 1")
    if (largest := max(ranks, default=1)) > method.max_rank:
        raise StrategyError(f"a client has rank {largest}, above lora.max_rank={method.max_rank}")
    if not method.traits.serves_mixed_ranks and len(set(ranks)) > 1:
        raise StrategyError(
            f"strategy={name} needs one rank for all clients, got {sorted(set(ranks))}: "
            "use ranks=homogeneous, or a strategy for mixed ranks"
        )
    federation = method.options.federation
    if federation.robust != "none" and (reason := method.traits.not_robust):
        raise StrategyError(
            f"federation.robust={federation.robust} is refused for strategy={name}: {reason}"
        )
    if federation.upload != "fp32" and method.traits.uploads_sparsely:
        raise StrategyError(
            f"federation.upload={federation.upload} is refused for strategy={name}: its uploads "
            "are sparse, in float32"
        )
    if federation.error_feedback and (reason := no_error_feedback(method)):
        raise StrategyError(f"federation.error_feedback=true is refused for {name}: {reason}")
    kind = federation.server_optimizer.kind
    if kind != "none" and (reason := no_server_optimizer(method.traits)):
        raise StrategyError(server_optimizer_refusal(kind, name, reason))
    if method.options.privacy.secure_aggregation and not method.traits.sums_updates:
        raise StrategyError(secure_refusal(name, method.traits.sum_refusal))
    if federation.scaffold and (reason := no_server_optimizer(method.traits)):
        raise StrategyError(scaffold_refusal(name, reason))


def no_server_optimizer(traits: Traits) -> str:
    """Return the reason why a server optimizer, and SCAFFOLD, have no meaning; empty if they do."""
    if traits.changes_base:
        return "it merges into the base what the mean of a round lacks, which another step belies"
    if not traits.keeps_components:
        return "it makes new components in every round, of which those before say nothing"
    if traits.trains_cores:
        return "its clients train cores, and a step of each number of lora_B is none of a core"
    return ""


def server_optimizer_refusal(kind: str, name: str, reason: str) -> str:
    """Return the line that refuses a server optimizer for a method."""
    return f"federation.server_optimizer.kind={kind} is refused for strategy={name}: {reason}"


def scaffold_refusal(name: str, reason: str) -> str:
    """Return the line that refuses SCAFFOLD for a method."""
    return f"federation.scaffold=true is refused for strategy={name}: {reason}"


def secure_refusal(name: str, reason: str) -> str:
    """Return the line that refuses secure aggregation for a method."""
    return f"privacy.secure_aggregation=true is refused for strategy={name}: {reason}"


def no_error_feedback(method: Method) -> str:
    """Return the reason why error feedback is off; empty if it is on."""
    if method.options.federation.upload == "fp32":
        return "federation.upload=fp32 rounds nothing"
    if method.options.privacy.kind == "local_dp":
        return "under privacy=local_dp what is kept of one round would leak into the next"
    if not method.traits.keeps_components:
        return "it makes new components in every round"
    return ""


def private_division(method: Method) -> Division:
    """Return the divisor of a component's sum under central privacy.

    Raises
    ------
    StrategyError
        If more than clipped changes and fixed denominators decides; with the reason.
    """
    if method.traits.dp_division is None:
        raise StrategyError(f"strategy={_name(method)}: {method.traits.dp_refusal}")
    return method.traits.dp_division


def check_privacy(method: Method, profiles: Iterable[NodeProfile]) -> None:
    """Refuse a method whose rule, or whose plans for these nodes, the privacy cannot cover.

    Raises
    ------
    StrategyError
        With the reason.
    """
    kind = method.options.privacy.kind
    if kind == "central_dp":
        private_division(method)
    if kind == "local_dp":
        for profile in profiles:
            try:
                check_local_plan(method.plan(profile, 1))
            except PrivacyError as error:
                raise StrategyError(str(error)) from error


def check_scaffold(method: Method, profile: NodeProfile) -> None:
    """Refuse SCAFFOLD for plans under which the server does not know what is trained, or how.

    Raises
    ------
    StrategyError
        With the reason.
    """
    if not method.options.federation.scaffold:
        return
    for server_round in (1, 2):  # some first rounds are unlike all others
        if reason := _hides_gradients(method.plan(profile, server_round)):
            raise StrategyError(scaffold_refusal(_name(method), reason))


def _hides_gradients(plan: TrainPlan) -> str:
    """Return why a client's gradients do not follow from its upload; empty if they do."""
    if plan.choice is not None:
        return "its clients choose what they train"
    if plan.align is not None:
        return "its clients rotate what they upload"
    if plan.upload != "fp32":
        return f"its uploads are {plan.upload}, and control variates follow from whole ones"
    return ""


def check_rank_patterns(profile: NodeProfile, modules: Iterable[str]) -> None:
    """Refuse a rank pattern without effect: most likely it was written for another model.

    Raises
    ------
    StrategyError
        Naming the pattern and a module that there is.
    """
    names = list(modules)
    for pattern in profile.rank_pattern:
        if not any(matches(pattern, name) for name in names):
            raise StrategyError(
                f"partition {profile.partition_id}: rank_pattern {pattern!r} matches none of the "
                f"{len(names)} adapted modules, such as {names[-1]!r}"
            )


def _name(method: Method) -> str:
    return type(method).__module__.rpartition(".")[2]
