"""Where checkpoints come from: data sets, the papers' networks, training.

Fixed choices for reproductions; a weaker promise than the library around it.
"""
