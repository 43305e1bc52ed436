"""What Numba compiles; imported only where one of its kernels runs."""
