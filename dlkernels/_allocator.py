"""glibc's malloc, told to keep memory for the next step."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>


class _Mallinfo(ctypes.Structure):
    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")
    _fields_ = [(name, ctypes.c_int) for name in (*_names, "fordblks", "keepcost")]


def tune_allocator() -> bool:
    """Makes this process keep memory that was freed, for good: call it before training.

    As installed, glibc gives every large tensor pages of its own and returns them when the tensor
    dies. The next step then waits for the system to clear new ones, often for longer than it
    computes. This is ``mallopt(M_MMAP_MAX, 0)`` and ``mallopt(M_TRIM_THRESHOLD, -1)``, the same as
    ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`` in the environment, and speeds up PyTorch's
    kernels as well. Huge pages are left as they are: once pages are kept, they gained
    nothing that could be measured.

    The price: other processes don't get back what a peak has taken until this one ends, and holes
    between live tensors can make the peak itself higher. Threads that have an arena of their own
    gain less than the main thread.

    Returns:
        Whether glibc serves malloc here, and so whether anything has changed.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library
        return False
    if not _serves_malloc(libc):
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))


def _serves_malloc(libc: ctypes.CDLL) -> bool:
    """Whether memory comes from glibc, and not from an allocator that was preloaded. The address of
    malloc does not tell: where the interpreter is no PIE, it is one in the interpreter."""
    size = 1 << 26
    libc.mallinfo.restype = _Mallinfo
    everyones = ctypes.CDLL(None)
    everyones.malloc.argtypes, everyones.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    everyones.free.argtypes, everyones.free.restype = [ctypes.c_void_p], None

    def used() -> int:  # modulo 2^32
        info = libc.mallinfo()
        return info.hblkhd + info.uordblks

    before = used()
    memory = everyones.malloc(size)
    grown = (used() - before) % 2**32
    everyones.free(memory)
    return size // 2 < grown < 2 * size
