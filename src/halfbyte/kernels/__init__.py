"""The ops: `reference/` defines them, `table` says which kernel runs where."""
