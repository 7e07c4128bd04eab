"""Numbers of which only the sum can be read: fixed point plus masks that cancel.

Every pair of participants draws the same stream from a secret that the coordinator does not have; one adds it, the
other subtracts it, modulo 2⁶⁴ (arXiv 1611.04482, without its recovery of those who drop out: the sum is made anew
without them). The sum is that of the fixed-point numbers, bit for bit: all that is lost is their rounding. One secret
for all means that a participant who hands it to the coordinator takes away everybody's mask.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 20  # numbers drawn at a time


def fixed(tensor: Tensor, fraction: int, parties: int) -> Tensor:
    """Round to int64 multiples of ``2^-fraction``.

    Args:
        tensor: Floats; the sum over ``parties`` must fit 63 bits.
        fraction: Bits behind the point.

    Raises:
        ValueError: A number is not finite, or too large for that.
    """
    scaled = torch.ldexp(tensor.double(), torch.tensor(fraction)).round()
    if not bool((scaled.abs() < 2.0**62 / parties).all()):  # NaN is not below either
        largest = 2.0 ** (62 - fraction) / parties
        raise ValueError(f"a number of at least {largest:g} does not fit beside {fraction} bits of fraction")
    return scaled.to(torch.int64)


def floating(total: Tensor, fraction: int) -> Tensor:
    """The sum of fixed-point numbers as float64."""
    return torch.ldexp(total.double(), torch.tensor(-fraction))


def mask(secret: bytes, context: str, name: str, parties: Sequence[str], size: int) -> Tensor:
    """What a participant adds to its numbers, int64 ``(size,)``: over all ``parties`` they sum to 0 modulo 2⁶⁴.

    Args:
        secret: Shared by the participants.
        context: What is masked; no two sums may have the same, or their difference shows.
        parties: All who add a mask; ``name`` is one of them.
    """
    total = np.zeros(size, dtype=np.uint64)
    for other in parties:
        if other == name:
            continue
        first, second = sorted((name, other))
        key = hmac.digest(secret, f"mask\n{context}\n{first}\n{second}".encode(), "sha256")
        for number, begin in enumerate(range(0, size, _BLOCK)):
            part = total[begin : begin + _BLOCK]
            drawn = hashlib.shake_256(key + number.to_bytes(8, "little")).digest(8 * len(part))
            stream = np.frombuffer(drawn, dtype="<u8")
            part += stream if name == first else -stream  # modulo 2⁶⁴
    return torch.from_numpy(total.view(np.int64))
