"""What releases cost: composition, inexact noise, groups, budgets."""
