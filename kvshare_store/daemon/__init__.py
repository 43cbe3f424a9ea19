"""The Store behind a socket: one daemon a home, shared by every engine on the machine."""
