"""Plain-torch implementations: the specification that every faster implementation must meet."""
