"""Values that pass between the rooms; they know nothing of each other's makers."""
