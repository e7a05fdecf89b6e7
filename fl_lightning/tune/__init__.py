"""Choosing hyper-parameters by private scores, with a charge for the choice."""
