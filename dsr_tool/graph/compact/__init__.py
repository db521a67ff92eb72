"""Compaction: removal of filters and input channels that do no work.

`walk` follows the channels of every value through the graph, with a rule for each operator (`products` has those of
weights); `needs` finds the channels that must stay; `rewrite` builds the smaller graph; `record` measures the savings.
"""
