"""Recipes: rows of published tables as settings that `convert` and `train` can run.

`recipe` has the two nouns, a row and a family of rows; `files` reads them from TOML; `keys` says which keys a recipe
may have; `apply` combines a recipe with the command line; `listing` prints them. The TOML files here are the shipped
families.
"""
