"""Background work and maintenance commands: garbage, checks, purges, archives."""
