"""What is asked of the machine: the device, with and without a GPU, and signals."""
