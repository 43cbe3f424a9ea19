"""A trace of requests replayed against the store's eviction policies, without any rows."""
