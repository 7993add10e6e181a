"""What runs, and on what: base model, adapter, attention, kernels. May import cli, options and files."""
