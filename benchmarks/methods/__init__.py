"""Every baseline behind one interface: a prompt and earlier prompts in, a filled cache out."""
