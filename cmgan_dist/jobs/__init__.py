"""One function over many shards: who does what, and what is done."""
