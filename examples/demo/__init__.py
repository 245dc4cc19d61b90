"""The demo: emoji recognised across vendors, emoji included that were never learned."""
