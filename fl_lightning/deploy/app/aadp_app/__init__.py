"""The Flower app of a federation."""
