"""Keskar et al. (2017): every table and figure, for small- and large-batch networks.

From each starting point one network is trained with the small and one with the large
batch. Measures run BatchNorm on batch statistics (the authors' Keras models kept no
others) unless they say otherwise.
"""

from __future__ import annotations

from sharpness.reproduce.keskar2017 import figures, in_short, tables
from sharpness.reproduce.keskar2017.study import STUDIES
from sharpness.reproduce.paper import InShort, Paper

PAPER = Paper(
    name="keskar2017",
    citation="Keskar, Mudigere, Nocedal, Smelyanskiy, Tang (2017), On Large-Batch Training "
    "for Deep Learning: Generalization Gap and Sharp Minima, arXiv:1609.04836",
    says="large batches end in sharper minima, and generalise worse",
    items=(*tables.ITEMS, *figures.ITEMS, *tables.REMEDIES),
    studies=STUDIES,
    in_short=InShort(
        about=lambda study: study.about_ends,
        observations=in_short.observations,
        sentences=in_short.sentences,
        columns=("", "small batch", "large batch", "large / small", "paper"),
        rows=in_short.rows,
        figure=in_short.figure,
    ),
)
