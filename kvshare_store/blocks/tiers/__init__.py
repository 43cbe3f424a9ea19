"""One module a tier; `base.Tier` is the interface that all of them obey."""
