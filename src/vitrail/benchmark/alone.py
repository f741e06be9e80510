"""The most memory that one side needs, in a process of its own: sides in one process cannot be told apart.

python -m vitrail.benchmark.alone '{"kind": "inference", ...}'      prints one JSON object
"""

import contextlib
import json
import subprocess
import sys
from typing import Any

from vitrail.core.errors import UserError

CALLS = 2


def peak(what: dict[str, Any]) -> dict[str, int] | None:
    """{"peak", "base"} in bytes of a process that builds a side and calls it: base is what Python, torch and the libraries
    take without a model. None where the system does not say. On a GPU, "peak" is of the GPU's memory and base is 0.

    Raises UserError, with its last words, where that process ends in an error.
    """
    command = [sys.executable, "-m", "vitrail.benchmark.alone", json.dumps(what)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"The memory of {what['side']} could not be measured ({last}); give --no-peaks.")
    found: dict[str, int] | None = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    import torch

    from vitrail.benchmark import inference, peers, training
    from vitrail.benchmark.machine import pinned
    from vitrail.benchmark.subject import subject
    from vitrail.experiments.costs import resident
    from vitrail.inference.graphs import import_openvino

    what = json.loads(sys.argv[1])
    device = torch.device(what["device"])
    with pinned(what["threads"]):
        # What comes with a first step of anything is no side's own.
        small = subject("ViT-Nano/16", 32)
        for _ in range(2):
            training.vitrail_step(small, training.batch_of(small.preprocess, 1, 1000), torch.device("cpu"), "bf16")()
        library = what["side"].split()[0]
        if library.startswith(peers.PEERS):
            peers.build(library, small.config.backbone, 1000)
        elif what["kind"] == "inference":
            with contextlib.suppress(UserError):
                import_openvino()
        if what["kind"] == "inference":
            work = inference.Work(*(what[name] for name in ("model", "batch", "size", "threads", "device", "merge")))
            before = resident("VmRSS")
            call, _ = inference.side(what["side"], work, work.build(), tuple(what["against"]))
        else:
            before = resident("VmRSS")
            model = subject(what["model"], what["size"])
            model.backbone.checkpointing = what["checkpointing"]
            options = {"compile": what["compile"], "accumulate": what["accumulate"]}
            call = training.side(what["side"].split()[0], model, what["batch"], device, what["precision"], **options)
        for _ in range(CALLS):
            call()
    if device.type == "cuda":
        print(json.dumps({"peak": torch.cuda.max_memory_allocated(device), "base": 0}))
        return 0
    most = resident("VmHWM")
    print(json.dumps(None if most is None else {"peak": most, "base": before}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
