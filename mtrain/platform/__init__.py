"""What differs between machines with and without a GPU, in one place."""
