"""Rows of published tables: the shipped TOML files, and what a row means for `convert` and `train`."""
