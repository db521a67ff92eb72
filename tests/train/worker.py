"""One process of a training by several: `python worker.py FOLDER OPTIONS`, with the environment that torchrun sets.

OPTIONS is JSON: `settings` of the training; `network`; `data`; `log` for another log; `resume` to train one epoch and
stop; `die` to be killed at a moment; `count` to write the bytes that went through an interface between two steps. The
weights and masks of rank R are left in FOLDER/rankR.pt.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import distributed, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from converters.conversion import convert
from converters.loading import load
from dsr_tool.errors import DsrError
from dsr_tool.train import Follower, RunFolder, joined, load_data, loop, step, train_in_folder


class Branches(nn.Module):
    """A head that nothing uses, and one of two outputs, as GoogLeNet has them, only while training."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head, self.unused, self.auxiliary = nn.Linear(512, 10), nn.Linear(512, 10), nn.Linear(512, 10)

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1)
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


def network(kind):
    """Returns a network without batch normalisation, whose batches may be shared out without a trace."""
    if kind == "branches":
        return Branches()
    channels = 64 if kind == "wide" else 8
    head = nn.Linear(64 * channels, 10)
    layers = [
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3 * (kind == "dropout")),
        head,
    ]
    if kind == "wide":
        layers.insert(2, nn.Conv2d(channels, channels, 3, padding=1))
    if kind == "norm":
        layers.insert(1, nn.BatchNorm2d(channels))
    return nn.Sequential(*layers)


def on_loss(look):
    """Calls a function with the number and the loss of each step, between forward and backward pass.

    Hooks on the network would keep its kernels from running.
    """
    training_loss, steps = step.training_loss, 0

    def looked_at(*arguments):
        nonlocal steps
        steps += 1
        loss, scores = training_loss(*arguments)
        look(steps, loss)
        return loss, scores

    step.training_loss = looked_at


def kill_at(moment, when):
    """Lets this process be killed in step `when`, or right after it."""
    done = 0

    def die(*_):
        if done == when:
            os.kill(os.getpid(), signal.SIGKILL)

    def look(number, loss):
        nonlocal done
        done = number
        if moment == "forward":
            die()
        if moment == "backward":
            loss.register_hook(die)

    def and_die(function):
        return lambda *arguments: die() or function(*arguments)

    on_loss(look)
    if moment == "step":
        register_optimizer_step_pre_hook(die)
    if moment == "evaluation":
        loop.evaluate = and_die(loop.evaluate)
    if moment == "saving":
        RunFolder.on_state = and_die(RunFolder.on_state)


def count_bytes(interface, first, last, file):
    """Writes the bytes that an interface sends from one step to another."""
    before = 0

    def look(number, _loss):
        nonlocal before
        if number in (first, last):
            distributed.barrier()
            time.sleep(0.2)  # until the messages of the barrier have arrived
            lines = Path("/proc/net/dev").read_text().splitlines()
            sent = next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith(interface))
            if number == last:
                file.write_text(str(sent - before))
            before = sent
            distributed.barrier()

    on_loss(look)


def main():
    torch.set_num_threads(1)
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    kind, resume = options.get("network", "plain"), options.get("resume", False)
    given = {"epochs": 3, "batch_size": 24, "augment": "crop-flip", "device": "cpu", **options.get("settings", {})}
    with joined(torch.device("cpu")) as ranks:
        run = RunFolder(folder / "run", resume=resume) if ranks.first else Follower(folder / "run", resume)
        torch.manual_seed(ranks.rank if options.get("differing") else 0)
        module = network(kind)
        if run.stopped:
            model = load(folder / "run", module)
        else:
            model = convert(module, sparsity=0.8, input_shape=(3, 8, 8), positions="random", seed=0)
        if options.get("frozen"):
            next(module.parameters()).requires_grad_(False)
        if "die" in options and options["die"]["rank"] == ranks.rank:
            kill_at(options["die"]["moment"], options["die"]["step"])
        if "count" in options:
            count_bytes(**options["count"], file=folder / f"sent{ranks.rank}")
        data = load_data(options.get("data", "fake:200"), model.config)
        deadline = 0.0 if options.get("pause") else float("inf")
        log = options.get("log")
        train_in_folder(run, model, data, given, facts={"data": "fake"}, log=log, quiet=True, deadline=deadline)
        masks = {f"mask {name}": mask for name, mask in model.masks.items()}
        torch.save({**model.module.state_dict(), **masks}, folder / f"rank{ranks.rank}.pt")


if __name__ == "__main__":
    try:
        main()
    except DsrError as error:
        print(f"dsr-tool: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
