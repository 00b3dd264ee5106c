"""Plans as hypothesis draws them."""

from dataclasses import replace

from hypothesis import strategies as st

from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.component_lists import BIT_LEVELS
from hafl_app.plan_parts.module_plan import ModulePlan
from hafl_app.plan_parts.tail_pruning import TailPruning


@st.composite
def module_plans(draw):
    """Draw a module's components."""
    held = draw(st.lists(st.integers(0, 40), unique=True, max_size=9).map(tuple))
    trainable = draw(st.lists(st.sampled_from(held), unique=True)) if held else []
    scaling = draw(st.floats(1e-3, 1e3) | st.sampled_from([16 / 30, 1.0]))
    factors = draw(st.sampled_from(["A", "B", "both"]))
    gain, own = draw(st.sampled_from([1.0, 4.0])), factors == "both" and draw(st.booleans())
    return ModulePlan(held, tuple(trainable), scaling, factors=factors, gain=gain, own_lora_B=own)


@st.composite
def with_bits(draw, plan):
    """Draw bits for the same components."""
    count = len(plan.trainable)
    bits = draw(st.lists(st.sampled_from(BIT_LEVELS), min_size=count, max_size=count))
    return replace(plan, bits=tuple(sorted(bits, reverse=True)))


uploads = st.sampled_from(
    [{}, *({"upload": u, "error_feedback": f} for u in ("bf16", "int8") for f in (True, False))]
)


@st.composite
def train_plans(draw):
    """Draw a whole plan."""
    tails = st.builds(
        TailPruning,
        decay=st.floats(0, 1),
        weight=st.floats(0, 10),
        min_rank=st.integers(1, 8),
        prune=st.booleans(),
    )
    modules, upload = st.dictionaries(st.text(max_size=12), module_plans(), max_size=5), uploads
    if draw(st.booleans()):
        densities = st.sampled_from([0.1, 0.5])
        upload = st.builds(lambda d: {"upload": "sparse", "density": d}, densities)
    elif draw(st.booleans()):
        upload = st.builds(lambda f: {"upload": "mixed", "error_feedback": f}, st.booleans())
        mixed = module_plans().flatmap(with_bits)
        modules = st.dictionaries(st.text(max_size=12), mixed, max_size=5)
    return TrainPlan(
        modules=draw(modules),
        head=draw(st.sampled_from(["averaged", "frozen", "local"])),
        importance=draw(st.sampled_from(["none", "sensitivity", "smoothed", "adalora"])),
        importance_smoothing=draw(st.floats(0, 0.99)),
        probe_batches=draw(st.integers(0, 9)),
        tail=draw(st.none() | tails),
        local_epochs=draw(st.integers(1, 9)),
        max_steps=draw(st.integers(0, 99)),
        proximal=draw(st.floats(0, 10) | st.just(0.0)),
        logit_adjustment=draw(st.none() | st.floats(0, 2)),
        rates=draw(st.just((1.0,)) | st.lists(st.floats(1e-6, 1), min_size=1).map(tuple)),
        **draw(upload),
    )
