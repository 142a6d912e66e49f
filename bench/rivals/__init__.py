"""Published methods of cross-modal retrieval on the same features as ours, written from their papers."""
