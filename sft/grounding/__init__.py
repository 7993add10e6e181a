"""Text alone: sentences, citations, numbers, and the check of a summary against its note.

Imports nothing else of this package, and never torch."""

from sft.grounding.check import Check, CheckedSentence, Finding, PreparedNote, check_summary

__all__ = ["Check", "CheckedSentence", "Finding", "PreparedNote", "check_summary"]
