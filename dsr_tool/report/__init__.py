"""Footprints of models, runs and files, as terminal tables and JSON."""
