"""Known quality: scored answers, what they say of a class of traffic, and which policy it gets."""
