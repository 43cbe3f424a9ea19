"""What the daemon says over HTTP: a page for people, JSON for programs, metrics, health."""
