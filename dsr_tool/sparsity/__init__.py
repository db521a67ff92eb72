"""The nouns of sparsity, with numpy alone: masks, layers, budgets, distributions, sparse tensors, configurations."""
