"""Hand-written mutations of the kernels and the mechanism, and the runner that tries them.

`python -m tests.mutation` (`make mutate`) changes one place at a time in a copy of the tree, runs
the tests that should notice, and writes docs/mutation.md. It is no part of CI; a quick test sees to
it that every mutation still fits the sources.
"""
