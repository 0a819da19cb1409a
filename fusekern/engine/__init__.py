"""One verb a file: train, evaluate, predict, and the checkpoints between them."""
