"""Engines: neighbour tables and nearest-class queries on normalised keys. FAISS lives here; gRPC does not."""
