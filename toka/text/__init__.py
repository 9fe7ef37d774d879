"""Text to token ids and back (floor 4, no torch): tokenizer, chat template, detokenizer, stop strings, grammars, replies, calls."""
