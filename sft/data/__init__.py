"""A file -> checked rows -> prompts and tokens -> batches. May import grounding, cli, options and files; torch only inside functions."""
