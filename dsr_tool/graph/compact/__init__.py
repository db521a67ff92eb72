"""Compaction: what a graph computes without the filters and input channels that do no work."""
