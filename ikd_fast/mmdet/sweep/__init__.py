"""Runs of one config over a grid of settings: what each changes, how long it is, how one is trained and evaluated."""
