"""Nodes become durable and go: the home, the queue, and the thread that empties it."""
