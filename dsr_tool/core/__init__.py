"""The nouns without torch: masks, budgets, distributions, codecs, the archive, footprints, the graph."""
