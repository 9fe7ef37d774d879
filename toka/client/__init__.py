"""`toka ping` and `toka chat`: a running server asked through the openai package, as any client would (floor 8, no torch)."""
