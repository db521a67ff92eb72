"""Containers that sparse models are written to, one file each, and the check that they hold the model."""
