"""Sparsity without torch: masks, layers, budgets, distributions, sparse tensors and the description of a model."""
