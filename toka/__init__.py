"""toka: a compiler-driven LLM inference engine."""
