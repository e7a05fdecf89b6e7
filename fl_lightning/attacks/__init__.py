"""Attacks on a run, as an attacker would do them: what they find is measured and proves nothing."""
