"""Pretrained networks: layer budgets, masks, values and norms by which a conversion keeps what a network learned.

Without pictures: `moments` derives mean and variance of every layer's input from the captured graph, with `signals` as
values, `moment_rules` for operators and `moment_layers` for layers; `paths` says how much of each layer reaches the
output. `importance` ranks weights with that, and `norms` gives back means and variances when the masks are applied.

With pictures: `pictures` reads them and `memory` says whether they fit. `sensitivity` measures what pruning each layer
costs (`inflow` ranks its weights, `gradients` and `trials` measure), and `allocation` turns the costs into counts.
`reconstruct` then fits layer after layer, on the pictures and `views` of them: `segments` goes from one of the `stages`
to the next, `survey` finds the layers by their `calls`, `inputs` samples each, `fitting` makes a problem of it, and
`solver` chooses mask and values, for layers that are `wide` in slices. An export in few bits goes the same way:
`rounding` fits layer after layer, and `codes` chooses what a weight is rounded to.
"""
