"""Use of a trained model: encode, embed, evaluate."""
