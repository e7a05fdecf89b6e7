"""Everything that can go wrong, tried before anything is charged."""
