"""Writing summaries: decoding, files of notes, the conversation. May import everything in this package but
training."""
