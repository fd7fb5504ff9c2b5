"""From which NUMA node the calling thread takes new memory: Linux's get_mempolicy and set_mempolicy, without libnuma.

What a thread starts inherits its policy. OSError where the system has no such calls or, as containers do, denies them.
"""

import ctypes
import errno
import os
import platform
import sys
from dataclasses import dataclass

_MAX_NODES = 1024  # of any Linux
_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)
_Mask = ctypes.c_ulong * (_MAX_NODES // _BITS)
_CALLS = {"x86_64": {"get": 239, "set": 238}, "aarch64": {"get": 236, "set": 237}}

# <linux/mempolicy.h>
DEFAULT, PREFERRED, BIND, INTERLEAVE, LOCAL = range(5)
_FLAGS = 0xE000


@dataclass(frozen=True)
class Policy:
    """mode: one of the above, perhaps with flags of <linux/mempolicy.h>."""

    mode: int = DEFAULT
    nodes: tuple[int, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether memory comes from the node of the thread that first writes it, as it does unless somebody chose."""
        return self.mode & ~_FLAGS in (DEFAULT, LOCAL)


def get_policy() -> Policy:
    mode, mask = ctypes.c_int(), _Mask()
    _call("get", ctypes.byref(mode), mask, ctypes.c_ulong(_MAX_NODES + 1), None, ctypes.c_ulong(0))
    return Policy(mode.value, tuple(node for node in range(_MAX_NODES) if mask[node // _BITS] >> node % _BITS & 1))


def set_policy(policy: Policy) -> None:
    mask = _Mask()
    for node in policy.nodes:
        mask[node // _BITS] |= 1 << node % _BITS
    _call("set", ctypes.c_int(policy.mode), mask, ctypes.c_ulong(_MAX_NODES + 1))


def _call(name: str, *args: object) -> None:
    number = _CALLS.get(platform.machine(), {}).get(name)
    if number is None or sys.platform != "linux":
        raise OSError(errno.ENOSYS, f"{name}_mempolicy: {os.strerror(errno.ENOSYS)}")
    if ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}_mempolicy: {os.strerror(code)}")
