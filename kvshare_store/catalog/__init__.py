"""The durable copy of the nodes: LanceDB tables, and facts that several machines share."""
