"""GPU kernels written in Triton; imported only where there is a GPU."""
