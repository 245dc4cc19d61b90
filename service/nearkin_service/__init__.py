"""Build exact neighbour tables of class embeddings and serve them over gRPC."""
