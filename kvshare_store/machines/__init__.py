"""Several machines, one catalogue and one remote."""
