"""Everything about a model and the random generators that must come back."""

import random

import numpy as np
import torch


def fingerprint(model):
    """Everything that must come back: bits, identities and flags."""
    return {
        "bits": {k: v.clone() for k, v in model.state_dict().items()},
        "objects": {k: id(v) for k, v in model.state_dict(keep_vars=True).items()},
        "flags": [
            (name, m.training, getattr(m, "track_running_stats", None), sorted(vars(m)))
            for name, m in model.named_modules()
        ],
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "gradients": {
            k: None if p.grad is None else p.grad.clone()
            for k, p in model.named_parameters()
        },
        "versions": [p._version for p in model.parameters()],
        "switches": [
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ],
    }


def assert_same(before, after):
    for part in ("objects", "flags", "requires_grad", "versions", "switches"):
        assert after[part] == before[part]
    for part in ("bits", "gradients"):
        for name, tensor in before[part].items():
            there = after[part][name]
            assert there is None if tensor is None else torch.equal(there, tensor), name


def random_states():
    numpy_state = np.random.get_state()  # noqa: NPY002
    return [
        torch.get_rng_state().tolist(),
        [*map(str, numpy_state[:1]), numpy_state[1].tolist(), *numpy_state[2:]],
        random.getstate(),
    ]


def assert_states(before, after):
    for name, a, b in zip(("torch", "numpy", "python"), before, after, strict=True):
        assert a == b, f"{name}'s generator has moved"
