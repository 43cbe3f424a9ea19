"""The store alone: tiers, codecs, lookups, start-up, eviction. No engine."""
