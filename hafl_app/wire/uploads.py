"""Uploads under a plan: a client's factors, or their change in fewer bits; and back.

A rounded upload carries the change against the received adapter, which both sides know, so that
the error is relative to the change and not to the state, which grows. A factor that the plan does
not train is not uploaded. The head always travels in float32.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hafl_app.lowrank.factors import Adapter, LoraFactors
from hafl_app.lowrank.mixed_bits import MixedFactors
from hafl_app.lowrank.quantize import Int8Factors, RoundingErrors
from hafl_app.lowrank.sparse import largest_entries
from hafl_app.plan import TrainPlan
from hafl_app.plan_parts.number_formats import NumberFormat
from hafl_app.training.adapter_arrays import to_arrays
from hafl_app.wire.arrays import Float32, Numbers
from hafl_app.wire.records import AdapterArrays

Pair = tuple[Numbers, Numbers]


def encode_upload(
    upload: Adapter,
    received: Adapter,
    plan: TrainPlan,
    importance: Mapping[str, Float32],
    errors: Mapping[str, RoundingErrors],
    seed: int = 0,
) -> tuple[AdapterArrays, dict[str, RoundingErrors]]:
    """Return a client's upload under a plan, and its new rounding errors by module.

    Parameters
    ----------
    upload, received
        The trained adapter, reduced to its upload; and the adapter that the client received. A
        factor that the plan does not train may be left out, and is not uploaded in any case.
    plan
        As it was executed: where the client chooses, after its choice, which goes with the upload.
    importance
        Module name to component scores.
    errors
        Kept from earlier uploads, by module; returned unchanged unless the plan has
        ``error_feedback``.
    seed
        Of stochastic rounding, with ``mixed``; a new one for every upload.
    """
    modules, head = to_arrays(upload.only(plan.uploaded_factors))
    chosen = {} if plan.choice is None else {n: m.trainable for n, m in plan.modules.items()}
    if plan.upload == "fp32":
        return AdapterArrays(modules, head, importance, components=chosen), dict(errors)
    if plan.upload == "sparse":
        return AdapterArrays(_sparse(upload, received, plan), head, importance, "sparse"), {}
    pairs, scales, kept, bits = {}, {}, dict(errors), {}
    generator = torch.Generator().manual_seed(seed)
    for name, factors in upload.modules.items():
        wanted = _change(factors, received, plan, name)
        asked = plan.modules[name].trainable
        components = asked[: wanted.rank]
        before = kept.get(name) or RoundingErrors.none(wanted)
        if plan.error_feedback:
            wanted = before.added_to(wanted, components)
        sent = wanted.only(plan.modules[name].uploads)
        of_module: Pair | None
        if plan.upload == "mixed":
            bits[name] = tuple(b for b in plan.modules[name].bits[: sent.rank] if b)
            pairs[name], of_module = _mixed(sent, bits[name], plan.error_feedback, generator)
        else:
            pairs[name], of_module = _rounded(sent, plan.upload)
        if of_module is not None:
            scales[name] = of_module
        if plan.error_feedback:
            read = _padded(_decoded(pairs[name], of_module, plan.upload), wanted)
            kept[name] = before.after(wanted, read, components, asked)
    scores = {name: _to_bits(torch.from_numpy(array)) for name, array in importance.items()}
    return AdapterArrays(pairs, head, scores, plan.upload, scales, bits, chosen), kept


def decode_upload(arrays: AdapterArrays) -> AdapterArrays:
    """Return an upload with all its numbers in float32; a rounded one still holds changes."""
    if arrays.numbers in ("fp32", "sparse"):
        return arrays
    modules = {}
    for name, pair in arrays.modules.items():
        factors = _decoded(pair, arrays.scales.get(name), arrays.numbers)
        modules[name] = (factors.lora_A.numpy(), factors.lora_B.numpy())
    scores = {n: _from_bits(bits).float().numpy() for n, bits in arrays.importance.items()}
    return AdapterArrays(modules, arrays.head, scores, components=arrays.components)


def _sparse(upload: Adapter, received: Adapter, plan: TrainPlan) -> dict[str, Pair]:
    """Return the changes of the factors, all but the largest numbers 0."""
    changes = {
        name: _change(factors, received, plan, name).only(plan.modules[name].uploads)
        for name, factors in upload.modules.items()
    }
    total = sum(f.lora_A.numel() + f.lora_B.numel() for f in changes.values())
    scaling = {name: module.scaling for name, module in plan.modules.items()}
    largest = largest_entries(changes, plan.kept_numbers(total), scaling)
    return to_arrays(Adapter({name: largest[name] for name in changes}))[0]


def _change(factors: LoraFactors, received: Adapter, plan: TrainPlan, name: str) -> LoraFactors:
    """Return the change of both factors; an untrained one has none, and keeps its errors.

    A method may train one factor in one round and the other in the next.
    """
    module = plan.modules[name]
    before = received.modules[name].select(module.trainable_slots[: factors.rank])
    after = factors.only(module.uploads).filled(before)
    return LoraFactors(
        after.lora_A.cpu().float() - before.lora_A, after.lora_B.cpu().float() - before.lora_B
    )


def _rounded(factors: LoraFactors, numbers: NumberFormat) -> tuple[Pair, Pair | None]:
    """Return rounded factors, and with ``int8`` their scales."""
    if numbers == "bf16":
        return (_to_bits(factors.lora_A), _to_bits(factors.lora_B)), None
    coded = Int8Factors.of(factors)
    codes = (coded.lora_A.numpy(), coded.lora_B.numpy())
    return codes, (_to_bits(coded.scales_A), _to_bits(coded.scales_B))


def _mixed(
    factors: LoraFactors, bits: Sequence[int], contract: bool, generator: torch.Generator
) -> tuple[Pair, Pair]:
    """Return the first components in their bits, and their scales; the others are not sent."""
    first = factors.select(range(len(bits)))
    coded = MixedFactors.of(first, bits, contract=contract, generator=generator)
    codes = (coded.lora_A.numpy(), coded.lora_B.numpy())
    return codes, (_to_bits(coded.scales_A), _to_bits(coded.scales_B))


def _padded(read: LoraFactors, wanted: LoraFactors) -> LoraFactors:
    """Return the change that the server reads: zero where a number is not uploaded."""
    nothing = LoraFactors(torch.zeros_like(wanted.lora_A), torch.zeros_like(wanted.lora_B))
    there = range(read.rank)
    return nothing.replace(there, read.filled(nothing.select(there)))


def _decoded(pair: Pair, scales: Pair | None, numbers: NumberFormat) -> LoraFactors:
    if numbers == "bf16":
        lora_A, lora_B = (_from_bits(bits).float() for bits in pair)
        return LoraFactors(lora_A, lora_B)
    if scales is None:
        raise ValueError(f"factors in {numbers} need scales")
    codes_A, codes_B = (torch.from_numpy(codes) for codes in pair)
    scales_A, scales_B = (_from_bits(bits) for bits in scales)
    if numbers == "mixed":
        return MixedFactors(codes_A, scales_A, codes_B, scales_B).decoded()
    return Int8Factors(codes_A, scales_A, codes_B, scales_B).decoded()


def _to_bits(tensor: torch.Tensor) -> Numbers:
    """Round to bfloat16, to nearest, and return the bits."""
    return tensor.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def _from_bits(bits: Numbers) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
