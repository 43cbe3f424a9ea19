"""The nodes in memory: what a prompt left behind, and what nominates it as a donor."""
