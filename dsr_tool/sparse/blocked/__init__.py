"""Running sparse networks in the blocked layout on the kernels for training."""
