"""Content-addressed blocks through the tiers."""
