"""What nobody waits for: garbage, checks, purges."""
