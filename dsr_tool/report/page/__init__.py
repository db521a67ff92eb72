"""The page of `report --html`: one self-contained file."""
