"""Search over loss weights and learning rates: `python tune/search.py`."""
