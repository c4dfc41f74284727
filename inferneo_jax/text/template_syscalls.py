"""Limits the system calls of the process that renders chat templates, by seccomp.

Jinja's sandbox has had holes. A template that escapes through one finds itself in a process that
can only compute, answer and exit: it cannot start programs, and cannot signal or trace processes.
"""

import ctypes
import errno
import os
import struct
import sys

# For each machine: its number in audit.h, and the numbers of the system calls in asm/unistd.h.
_ALLOWED = {
    "x86_64": (
        0xC000003E,
        {
            "read": 0,
            "write": 1,
            "close": 3,
            "fstat": 5,
            "lseek": 8,
            "mmap": 9,
            "munmap": 11,
            "brk": 12,
            "rt_sigreturn": 15,
            "pread64": 17,
            "sched_yield": 24,
            "mremap": 25,
            "madvise": 28,
            "setitimer": 38,
            "getpid": 39,
            "exit": 60,
            "gettimeofday": 96,
            "time": 201,
            "futex": 202,
            "restart_syscall": 219,
            "clock_gettime": 228,
            "exit_group": 231,
            "getrandom": 318,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "close": 57,
            "lseek": 62,
            "read": 63,
            "write": 64,
            "pread64": 67,
            "fstat": 80,
            "exit": 93,
            "exit_group": 94,
            "futex": 98,
            "setitimer": 103,
            "clock_gettime": 113,
            "sched_yield": 124,
            "restart_syscall": 128,
            "rt_sigreturn": 139,
            "gettimeofday": 169,
            "getpid": 172,
            "brk": 214,
            "munmap": 215,
            "mremap": 216,
            "mmap": 222,
            "madvise": 233,
            "getrandom": 278,
        },
    ),
}

_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_RETURN_ERRNO = 0x0005_0000
_RETURN_ALLOW = 0x7FFF_0000
# Instructions of classic BPF: load a word of seccomp_data, jump if it equals a constant, return.
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER_OFFSET, _MACHINE_OFFSET = 0, 4


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def leave_few_system_calls() -> bool:
    """Have the kernel refuse all other system calls of this process, permanently.

    Returns False where this is not supported: on other systems or machines, and in kernels without
    seccomp.
    """
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in _ALLOWED or sys.maxsize < 1 << 32:
        return False
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    instructions = _filter(*_ALLOWED[machine])
    program = _Program(len(instructions) // 8, instructions)
    installed: int = library.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    )
    return installed == 0


def _filter(machine: int, numbers: dict[str, int]) -> bytes:
    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    calls = sorted(numbers.values())
    refuse, to_allow = len(calls), 1
    return b"".join(
        [
            instruction(_LOAD, _MACHINE_OFFSET),
            instruction(_JUMP_EQUAL, machine, 0, refuse + 1),
            instruction(_LOAD, _NUMBER_OFFSET),
            *(
                instruction(_JUMP_EQUAL, call, refuse - place - 1 + to_allow)
                for place, call in enumerate(calls)
            ),
            instruction(_RETURN, _RETURN_ERRNO | errno.EPERM),
            instruction(_RETURN, _RETURN_ALLOW),
        ]
    )
