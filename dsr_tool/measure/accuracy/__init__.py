"""Accuracy on a folder of pictures, and agreement with another network such as the dense one."""
