"""A paper's study, so small that all of it takes seconds."""

from dataclasses import replace

TINY_NETWORK = "MLP?width=8&depth=1&out_features=10"


def tiny(study):
    """`study` of Keskar et al. on 120 images of digits, from two starting points."""
    return replace(
        study,
        data="digits[120,test=60]",
        reduced="everything",
        small=10,
        large=60,
        epochs_small=(1, 2),
        epochs_large=(1, 2),
        num_seeds=2,
        num_followed=1,
        num_samples=40,
        swept=(),
        epochs_warm=0,
        num_remedied=2,
    )
