"""Background work and commands of maintenance: garbage, checks, purges, archives, and what other
machines with the same catalogue have stored and removed."""
