"""Push class embeddings to a nearkin service and read neighbour tables back."""
