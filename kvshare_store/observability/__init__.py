"""What the store counts and logs."""
