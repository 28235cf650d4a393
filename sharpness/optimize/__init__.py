"""Maximisation of a smooth function over a box, on whatever device the vectors are."""
