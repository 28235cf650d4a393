"""Where checkpoints come from: data, networks and training."""
