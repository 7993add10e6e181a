"""A file -> checked rows -> prompts and tokens -> batches.

May import grounding, cli, options and files; torch and numpy only inside functions, so that input errors are
instant."""
