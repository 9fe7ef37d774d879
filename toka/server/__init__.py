"""The HTTP server and its link to the engine process (floor 8, no torch)."""
