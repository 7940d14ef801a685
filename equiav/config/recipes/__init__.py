"""Named, complete runs. Each file begins with what it is, the command that runs it, and what it should reach."""
