"""Clip in backward: an ordinary backward pass whose parameter gradients are clipped sums.

A layer's own backward knows everything that clipping layer by layer needs. So one pass is enough,
and no gradient of the whole model is held per record.

| file | holds |
|---|---|
| functions.py | `clipped_linear` and its like, the public functions |
| modules.py | `with_clipping`, modules that call them |
| autograd.py | the autograd.Function under all of them |
| clip.py | norms of records, clip factors, counts |
| matrix_rules.py | linear layers and convolutions |
| other_rules.py | embeddings, normalisation, biases |
| watched.py, single_use.py | that every parameter is used once, by its own layer |
"""
