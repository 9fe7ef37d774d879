"""Models: what each computes (spec), the blocks they are made of, and one family a file."""
