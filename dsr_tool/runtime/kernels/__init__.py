"""The kernels: C++ sources, the libraries that the build hook compiles from them, and their loader."""
