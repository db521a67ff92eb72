"""Sparse models in torch: a module, the role of each parameter, its masks, and model folders."""
