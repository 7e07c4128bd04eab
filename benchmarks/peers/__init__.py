"""The peers of the parity benchmark, each trained on a job that potluck wrote: see `_job` for the folder it is given.

``python -m benchmarks.peers.NAME FOLDER``, in the environment of ``make peers``:

================== ==========================================================================================
torchft_diloco     torchft's DiLoCo: its outer step, quorum and all-reduce, a process for each participant
ddp                PyTorch's DistributedDataParallel: one optimizer, gradients averaged at every step
flower_fedavg      Flower's FedAvg: its rounds, mean and message format, participants one after the other
================== ==========================================================================================

``python -m benchmarks.peers.wire_NAME --folder SCRATCH`` moves tensors there and back, for `benchmarks.wire`: ``https``
is plain HTTPS, ``flower`` its deployment runtime, ``flare`` NVIDIA FLARE. What they share is in `_wire`.

Local steps are plain PyTorch. Whatever listens does so on 127.0.0.1.
"""

import os

os.environ |= {
    "GLOO_SOCKET_IFNAME": "lo",
    "FLWR_TELEMETRY_ENABLED": "0",
    "TORCHFT_WATCHDOG_TIMEOUT_SEC": "600",  # a busy machine is not a stuck one
    "RUST_LOG": "error",  # of torchft's lighthouse, read when it is loaded
}
