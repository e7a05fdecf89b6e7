"""What a run shows and keeps: callbacks, tables, checkpoints, loggers."""
