"""Latency, memory, and whether this machine has what dsr-tool needs."""
