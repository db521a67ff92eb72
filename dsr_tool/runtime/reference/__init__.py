"""The reference: every operator with numpy and scipy, and an interpreter that runs a graph with them."""
