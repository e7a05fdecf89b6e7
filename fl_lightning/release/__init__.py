"""How a number leaves a client: train, draw, compare, pay, write."""
