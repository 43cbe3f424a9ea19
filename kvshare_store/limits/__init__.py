"""What each tenant may have, and ask for in a second."""
