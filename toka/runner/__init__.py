"""What a step needs on the device: buffers, tables, KV cache, and the runner that turns a plan into a result."""
