"""The plan that runs on compiled kernels: from a graph to a list of operations on planes in one arena."""
