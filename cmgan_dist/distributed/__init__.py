"""Many processes: how they join, synchronise and share the work of training."""
