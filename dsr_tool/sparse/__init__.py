"""The torch side of the nouns: a module, what its parameters are, and which weights are active."""
