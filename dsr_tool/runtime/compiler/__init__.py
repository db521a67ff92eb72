"""The compiler of the runtime: lowers a graph to ops on values in one arena, which compiled kernels run."""
