"""Models: stacks of blocks and what is built on them."""
