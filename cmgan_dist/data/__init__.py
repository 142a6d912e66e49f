"""Bytes -> batches: shards, where they lie, in what order they are read."""
