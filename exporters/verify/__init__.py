"""Verification: a file is run and compared with the model that it should hold."""
