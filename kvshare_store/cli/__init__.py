"""The command line, one module for each command. Heavy libraries are imported only by the commands
that need them."""
