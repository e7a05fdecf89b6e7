"""Local training of clients; it knows nothing of privacy."""
