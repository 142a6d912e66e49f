"""Tensors -> tensors: backbones, generator, discriminators, and how a trained model is kept."""
