"""The measurement harness: one command for each figure, table or number that KVShare reports."""
