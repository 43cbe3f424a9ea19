"""Are the answers as good when KV is reused?"""
