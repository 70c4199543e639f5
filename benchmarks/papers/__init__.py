"""What the four papers claim, tried out; see README.md."""
