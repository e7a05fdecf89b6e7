"""Networks as functions of their parameters, and what they may look like."""
