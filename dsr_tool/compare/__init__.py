"""Comparison of methods: a grid of trainings, run by any number of processes, and its tables and page."""
