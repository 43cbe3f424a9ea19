"""Recorded traffic replayed without rows: against eviction policies, and against the planner."""
