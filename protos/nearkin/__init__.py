"""nearkin: the wire protocol of the neighbour service."""
