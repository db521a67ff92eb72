"""Comparing a written file with its model: tensors bit for bit, outputs on random inputs."""
