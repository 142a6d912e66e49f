"""Fused operations of the networks and the discriminators' loss, one operation a file."""
