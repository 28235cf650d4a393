"""What a point of a loss plane costs beside the model's bare forward passes.

    python benchmarks/landscape.py [NUM_SAMPLES]

C1 at its starting point, random colour images, 5 x 5 points, one thread. A bare pass calls
the network in evaluation mode, without gradients, in the risk's own chunks; the plane also
takes loss and accuracy, f at the centre, and the rule for points at once. Seconds are of
the processor, so that what else runs on the machine hardly counts. Prints one table and
writes the raw numbers as JSON beside this file.
"""

import json
import sys
import time
from pathlib import Path

import torch

import sharpness as sh
from sharpness.lab import networks
from sharpness.record import environment

SIDE = 5


def main() -> None:
    torch.set_num_threads(1)
    num_samples = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    model = networks.build({"name": "C1", "arguments": {}})
    networks.initialise(model, 0)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(num_samples, 3, 32, 32, generator=draw)
    y = torch.randint(10, (num_samples,), generator=draw)
    risk = sh.EmpiricalRisk(model, torch.nn.CrossEntropyLoss(), (x, y))
    chunks = x.split(risk.chunk_size)
    model.eval()

    def bare() -> None:
        with torch.no_grad():
            for chunk in chunks:
                model(chunk)

    bare()
    num = SIDE * SIDE + 1  # with the centre's own f
    halves = [spent(bare) for _ in range(num // 2)]
    plane = spent(lambda: sh.loss_plane(risk, num_points=SIDE, quadratic=False))
    halves += [spent(bare) for _ in range(num - num // 2)]
    row = {"bare_pass": sum(halves) / num, "point": plane / num}
    row |= {"ratio": row["point"] / row["bare_pass"], "num_samples": num_samples}
    print(
        "bare pass {bare_pass:.3f} s, point {point:.3f} s: {ratio:.3f} times".format(**row)
    )
    found = {**row, "chunk_size": risk.chunk_size, "environment": environment()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


def spent(work) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
