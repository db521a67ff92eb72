"""The kernels: C++ sources, what the build hook makes of them, and what loads that."""
