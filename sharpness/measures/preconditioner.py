"""What Adam divides by: the diagonal P of its preconditioned curvature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sharpness import _tensors
from sharpness._arguments import ensure, of_a_risk
from sharpness.risk.empirical import EmpiricalRisk


@of_a_risk
def adam_preconditioner(risk: EmpiricalRisk, optimizer_state: Mapping[str, Any]) -> Tensor:
    r"""The diagonal P by which Adam preconditions, for `eigenpairs(preconditioner=)`.

    $$P = (1 - \beta_1^t) \left(\sqrt{v / (1 - \beta_2^t)} + \epsilon\right)$$

    so that a step is $-\eta P^{-1} m$ with the first moment m. Full-batch Adam is
    stable up to $\lambda_{max}(P^{-1} H) = (2 + 2 \beta_1) / ((1 - \beta_1) \eta)$,
    38 / eta for the usual beta_1 = 0.9 (Cohen et al. 2022, arXiv:2207.14484).

    Args:
        risk: whose theta the result matches.
        optimizer_state: `optimizer.state_dict()` of `torch.optim.Adam`, `AdamW` or
            `NAdam`, or a checkpoint's `.optimizer`. Without names in it, the parameters
            are taken to be in the order of `model.parameters()`.

    Returns:
        P, (n,), positive, in the type and on the device of theta.

    Raises:
        ValueError: no second moments in it, or those of other parameters.

    Cost: none; memory n.
    """
    groups = optimizer_state.get("param_groups", ())
    states = optimizer_state.get("state", {})
    ensure(
        bool(groups and states),
        "optimizer_state",
        "be the state_dict of an Adam optimizer that has made steps",
        f"keys {', '.join(map(str, list(optimizer_state)[:4])) or 'none'}",
    )
    shapes = dict(zip(risk.names, risk.shapes, strict=True))
    found: dict[str, Tensor] = {}
    everything = [name for name, _ in risk.model.named_parameters()]
    for group in groups:
        names = group.get("param_names") or [
            everything[i] if i < len(everything) else str(i) for i in group["params"]
        ]
        for name, i in zip(names, group["params"], strict=True):
            if name in shapes:
                found[name] = _divisor(name, shapes[name], states.get(i), group)
    missing = [name for name in shapes if name not in found]
    ensure(
        not missing,
        "optimizer_state",
        "hold every parameter of theta",
        f"none for {' '.join(missing[:1])} ({len(missing)} missing)",
        "Build the risk with `params=` of those that were trained.",
    )
    flat = _tensors.flatten(found[name] for name in risk.names)
    return flat.to(risk.theta)


def _divisor(
    name: str, shape: torch.Size, state: Mapping[str, Any] | None, group: Mapping[str, Any]
) -> Tensor:
    state = state or {}
    ensure(
        "exp_avg_sq" in state,
        "optimizer_state",
        "hold Adam's second moments",
        f"none for {name}",
        "Only Adam, AdamW and NAdam keep them.",
    )
    second = state.get("max_exp_avg_sq", state["exp_avg_sq"]).double()
    ensure(
        second.shape == shape,
        "optimizer_state",
        "belong to this model",
        f"shape {tuple(second.shape)} for {name}, which has {tuple(shape)}",
    )
    (beta1, beta2), step = group["betas"], float(state["step"])
    unbiased = (second / (1 - beta2**step)).sqrt()
    divisor: Tensor = (1 - beta1**step) * (unbiased + group["eps"])
    return divisor
