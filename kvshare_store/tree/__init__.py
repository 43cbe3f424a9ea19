"""The DELTA tree: which prompt is which edit of which. Metadata only, no tensors."""
