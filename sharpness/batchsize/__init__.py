"""Which batch size? Time per update, updates to a target, and what follows from them."""
