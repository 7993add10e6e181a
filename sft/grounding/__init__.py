"""Text alone: sentences, citations, numbers. Imports nothing else of this package, and never torch."""
