"""One-shot pruning of a target's linear layers: which weights go, what the others become, layer by layer."""
