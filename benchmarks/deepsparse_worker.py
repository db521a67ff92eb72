"""Runs a model in DeepSparse, once per line on standard input; inference.py starts it as a contender.

The last releases of DeepSparse need another onnx than this project, so it runs in an environment of its own:
`python -m venv ds && ds/bin/pip install deepsparse "protobuf<4.22"`.

Run: ds/bin/python benchmarks/deepsparse_worker.py MODEL.onnx BATCH CORES
"""

import sys

import numpy as np
from deepsparse import compile_model


def main(path: str, batch: int, cores: int) -> None:
    """Compiles the model, prints `ready`, then runs it once per line and prints `done`."""
    engine = compile_model(path, batch_size=batch, num_cores=cores)
    # inference.py draws from this seed too, so no arrays have to cross the pipe.
    x = np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)
    # The parent waits for this line: compiling is not part of any run.
    print("ready", flush=True)
    for _ in sys.stdin:
        engine.run([x])
        print("done", flush=True)


main(sys.argv[1], *map(int, sys.argv[2:]))
