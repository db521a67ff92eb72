"""Pretrained networks: layer budgets, masks, values and norms by which a conversion keeps what a network learned."""
