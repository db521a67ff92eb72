"""DeepSparse on a model, one run for each line on standard input; what inference.py starts as a contender.

DeepSparse ended with releases that need another onnx than this project, so it runs in an environment of its own:
`python -m venv ds && ds/bin/pip install deepsparse "protobuf<4.22"`.

Run: ds/bin/python benchmarks/deepsparse_worker.py MODEL.onnx BATCH CORES
"""

import sys

import numpy as np
from deepsparse import compile_model


def main(path: str, batch: int, cores: int) -> None:
    """Compile the model, say so, and run it whenever asked to."""
    engine = compile_model(path, batch_size=batch, num_cores=cores)
    x = np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    print("ready", flush=True)
    for _ in sys.stdin:
        engine.run([x])
        print("done", flush=True)


main(sys.argv[1], *map(int, sys.argv[2:]))
