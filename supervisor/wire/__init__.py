"""Sans-IO: bytes in, wire events out. Nothing here knows of trio, sockets or providers."""
