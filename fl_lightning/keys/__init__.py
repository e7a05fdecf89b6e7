"""The secret of a run, and what its noise is bound to."""
