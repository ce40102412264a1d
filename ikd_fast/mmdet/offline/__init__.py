"""Adversarial images of a training set, made before training."""
