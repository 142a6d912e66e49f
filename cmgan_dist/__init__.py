"""Cross-modal GANs (Peng, Qi & Yuan, TOMM 2019) trained on streams of image-text pairs."""

__version__ = "0.1.0"
