"""What bytes come in."""

Buffer = bytes | bytearray | memoryview
