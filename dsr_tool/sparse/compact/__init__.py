"""Compact storage: the active weights of a network as one flat parameter, with their positions beside it."""
