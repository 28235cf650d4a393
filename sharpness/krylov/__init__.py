"""Linear algebra on a matrix known only by its products: `matvec` and `v0`."""
