"""Trains CAT, a one-step multi-stage GAN, on a Ray cluster."""

__version__ = "0.1.0"
