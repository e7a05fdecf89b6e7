"""The processes that share a run: how they start, talk, stop and go on."""
