"""How a model is trained: losses, phases, the loop, checkpoints."""
