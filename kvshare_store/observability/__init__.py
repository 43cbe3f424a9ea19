"""What the store counts and logs, and how its threads are."""
