"""The native side's runtime: CPUID, the rung in use, threads, and the array checks shared by every binding."""

import ml_dtypes
import numpy as np

cimport numpy as cnp

cnp.import_array()

cdef extern from "parallel.h" nogil:
    enum: PACE_NUM_RUNGS
    ctypedef void (*pace_hook)(pace_worker worker, const void *args, size_t begin, size_t end, void *scratch) noexcept
    int pace_num_threads()
    void pace_set_num_threads(int num_threads)
    int pace_asked_threads()
    void pace_renew_helpers(int threads)
    void pace_set_hook(pace_hook hook)
    int pace_run(pace_worker worker, const void *args, size_t items, size_t grain, bint even, size_t scratch_bytes)

cdef extern from *:
    """
    #include <cpuid.h>
    static int pace_cpuid(unsigned leaf, unsigned subleaf, unsigned out[4]) {
        return __get_cpuid_count(leaf, subleaf, &out[0], &out[1], &out[2], &out[3]);
    }
    static unsigned long long pace_xcr0(void) {
        unsigned low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        return ((unsigned long long)high << 32) | low;
    }
    """
    int pace_cpuid(unsigned leaf, unsigned subleaf, unsigned *out) nogil
    unsigned long long pace_xcr0() nogil

RUNGS = ("avx2", "avx512")  # in the order of enum pace_rung
cdef int _rung = 0
cdef object _hook = None
cdef object _hook_error = None  # what the hook raised, on its way through C
cdef int _bf16_num = np.dtype(ml_dtypes.bfloat16).num
cdef object _bf16_dtype = np.dtype(ml_dtypes.bfloat16)
cdef object _f32_dtype = np.dtype(np.float32)


def cpuid(unsigned leaf, unsigned subleaf=0):
    """(eax, ebx, ecx, edx) of a CPUID leaf, or None where the CPU does not have it."""
    cdef unsigned out[4]
    return (out[0], out[1], out[2], out[3]) if pace_cpuid(leaf, subleaf, out) else None


def xcr0():
    """The register state that the operating system saves (XCR0); 0 without OSXSAVE."""
    cdef unsigned out[4]
    return pace_xcr0() if pace_cpuid(1, 0, out) and out[2] & (1 << 27) else 0


def set_rung(str name):
    """Make every binding run the objects of this rung. Whether the CPU can is the caller's to know (pace.isa)."""
    global _rung
    _rung = RUNGS.index(name)


def get_rung():
    return RUNGS[_rung]


def get_num_threads():
    return pace_num_threads()


def asked_num_threads():
    return pace_asked_threads() or None


def set_num_threads(num_threads):
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}; it must be at least 1")
    pace_set_num_threads(num_threads or 0)


def renew_helpers(int num_threads):
    """New helpers, raised by this thread: they have its CPUs and its memory policy. Where nobody asks for a number of
    threads, there are `num_threads`, or with 0 as many as this thread has CPUs.
    """
    with nogil:
        pace_renew_helpers(num_threads)


cdef void _call_hook(pace_worker worker, const void *args, size_t begin, size_t end, void *scratch) noexcept with gil:
    global _hook_error
    try:
        _hook(<size_t>worker, <size_t>args, begin, end, <size_t>scratch)
    except BaseException as error:
        _hook_error = error


def set_hook(hook):
    """Have `hook(worker, args, begin, end, scratch)`, all addresses and sizes, called in place of every worker.

    For tests that execute a worker's machine code elsewhere (an emulated CPU). None takes it away. What it raises,
    the kernel's caller gets. Returns the hook that it replaces.
    """
    global _hook
    previous, _hook = _hook, hook
    if hook is None:
        pace_set_hook(NULL)
    else:
        pace_set_hook(_call_hook)
    return previous


cdef int run(
    const pace_worker *workers, const void *args, size_t items, size_t grain, size_t scratch_bytes, bint even=True
) except -1:
    """The one line where the rung is chosen."""
    global _hook_error
    cdef int failed
    with nogil:
        failed = pace_run(workers[_rung], args, items, grain, even, scratch_bytes)
    if _hook_error is not None:
        error, _hook_error = _hook_error, None
        raise error
    if failed:
        raise MemoryError(f"no memory for {scratch_bytes} bytes of kernel scratch a thread")
    return 0


cdef int num_threads() noexcept nogil:
    return pace_num_threads()


cdef bint is_native(cnp.ndarray array, int typenum) noexcept:
    """Whether C reads the elements as they are: of NumPy type `typenum` (or its twin, as long long is long's), in this
    machine's byte order, aligned.
    """
    cdef int num = cnp.PyArray_TYPE(array)
    return (
        (num == typenum or cnp.PyArray_EquivTypenums(num, typenum))
        and cnp.PyArray_ISNOTSWAPPED(array)
        and cnp.PyArray_ISALIGNED(array)
    )


cdef int check_type(cnp.ndarray array, str name, int typenum) except -1:
    if is_native(array, typenum):
        return 0
    wanted = np.dtype(cnp.PyArray_DescrFromType(typenum))
    if array.dtype != wanted:
        raise TypeError(f"{name} has dtype {array.dtype}; it must be {wanted}")
    raise ValueError(f"{name} is not aligned to its elements")


cdef int kind_of(cnp.ndarray array, str name) except -1:
    """F32 or BF16; TypeError for any other dtype, ValueError for an array that is not aligned."""
    cdef int num = cnp.PyArray_TYPE(array)
    if (num == cnp.NPY_FLOAT32 or num == _bf16_num) and is_native(array, num):
        return F32 if num == cnp.NPY_FLOAT32 else BF16
    if array.dtype in (_f32_dtype, _bf16_dtype):
        raise ValueError(f"{name} is not aligned to its elements")
    raise TypeError(f"{name} has dtype {array.dtype}; it must be float32 or bfloat16")


cdef int check_rows(cnp.ndarray array, str name, Py_ssize_t columns) except -1:
    """(rows, columns), any row stride, contiguous within a row; columns < 0 takes any."""
    if cnp.PyArray_NDIM(array) != 2 or (columns >= 0 and cnp.PyArray_DIM(array, 1) != columns):
        wanted = "columns" if columns < 0 else columns
        raise ValueError(f"{name} has shape {np.shape(array)}; it must be (rows, {wanted})")
    cdef Py_ssize_t size = cnp.PyArray_ITEMSIZE(array)
    if cnp.PyArray_DIM(array, 1) > 1 and cnp.PyArray_SIZE(array) and cnp.PyArray_STRIDE(array, 1) != size:
        raise ValueError(f"{name} has strides {(<object>array).strides}; its rows must be contiguous")
    return 0


cdef int check_heads(cnp.ndarray array, str name, Py_ssize_t tokens, Py_ssize_t head_dim) except -1:
    """(tokens, heads, head_dim), any token stride, contiguous within a token; a negative number takes any."""
    cdef Py_ssize_t size = cnp.PyArray_ITEMSIZE(array)
    if (
        cnp.PyArray_NDIM(array) != 3
        or (tokens >= 0 and cnp.PyArray_DIM(array, 0) != tokens)
        or (head_dim >= 0 and cnp.PyArray_DIM(array, 2) != head_dim)
    ):
        wanted = "tokens" if tokens < 0 else tokens, "heads", "head_dim" if head_dim < 0 else head_dim
        raise ValueError(f"{name} has shape {np.shape(array)}; it must be ({', '.join(map(str, wanted))})")
    if cnp.PyArray_SIZE(array) and (
        (cnp.PyArray_DIM(array, 2) > 1 and cnp.PyArray_STRIDE(array, 2) != size)
        or (cnp.PyArray_DIM(array, 1) > 1 and cnp.PyArray_STRIDE(array, 1) != size * cnp.PyArray_DIM(array, 2))
    ):
        raise ValueError(f"{name} has strides {(<object>array).strides}; the heads of a token must be contiguous")
    return 0


cdef int check_vector(cnp.ndarray array, str name, Py_ssize_t length, int typenum) except -1:
    """A contiguous vector of `length` elements of NumPy type `typenum`."""
    check_type(array, name, typenum)
    if cnp.PyArray_NDIM(array) != 1 or cnp.PyArray_DIM(array, 0) != length:
        raise ValueError(f"{name} has shape {np.shape(array)}; it must be ({length},)")
    if length > 1 and cnp.PyArray_STRIDE(array, 0) != cnp.PyArray_ITEMSIZE(array):
        raise ValueError(f"{name} has strides {(<object>array).strides}; it must be contiguous")
    return 0


cdef cnp.ndarray empty_rows(Py_ssize_t rows, Py_ssize_t columns, int kind):
    return np.empty((rows, columns), _bf16_dtype if kind == BF16 else _f32_dtype)


cdef int check_kind(cnp.ndarray array, str name, int kind) except -1:
    """The dtype that another array has."""
    if kind_of(array, name) != kind:
        raise TypeError(f"{name} has dtype {array.dtype}; it must be {_bf16_dtype if kind == BF16 else _f32_dtype}")
    return 0


cdef int check_writeable(cnp.ndarray array, str name) except -1:
    if not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError(f"{name} is read-only")
    return 0


cdef bint bounds_overlap(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Of two arrays of rows: whether the memory from the first byte of one to its last holds a byte of the other."""
    cdef Py_ssize_t a_span = (cnp.PyArray_DIM(a, 0) - 1) * cnp.PyArray_STRIDE(a, 0)
    cdef Py_ssize_t b_span = (cnp.PyArray_DIM(b, 0) - 1) * cnp.PyArray_STRIDE(b, 0)
    cdef Py_ssize_t a_row = cnp.PyArray_DIM(a, 1) * cnp.PyArray_ITEMSIZE(a)
    cdef Py_ssize_t b_row = cnp.PyArray_DIM(b, 1) * cnp.PyArray_ITEMSIZE(b)
    cdef Py_ssize_t a_at = <Py_ssize_t>cnp.PyArray_DATA(a), b_at = <Py_ssize_t>cnp.PyArray_DATA(b)
    return (
        a_at + min(a_span, 0) < b_at + max(b_span, 0) + b_row
        and b_at + min(b_span, 0) < a_at + max(a_span, 0) + a_row
    )


cdef int check_apart(cnp.ndarray array, str name, cnp.ndarray other, str other_name) except -1:
    """Rows that have no memory in common. Columns of one matrix lie between each other: NumPy settles those."""
    if bounds_overlap(array, other) and np.shares_memory(array, other):
        raise ValueError(f"{name} shares memory with {other_name}; they must be two arrays")
    return 0


cdef int check_output_rows(cnp.ndarray array, str name, Py_ssize_t rows, Py_ssize_t columns, int kind) except -1:
    """(rows, columns) of `kind` that may be written."""
    check_kind(array, name, kind)
    check_rows(array, name, columns)
    if cnp.PyArray_DIM(array, 0) != rows:
        raise ValueError(f"{name} has shape {np.shape(array)}; it must be ({rows}, {columns})")
    return check_writeable(array, name)


cdef cnp.ndarray output_rows(object out, Py_ssize_t rows, Py_ssize_t columns, int kind):
    """`out` checked, or a new array where it is None."""
    if out is None:
        return empty_rows(rows, columns, kind)
    check_output_rows(out, "out", rows, columns, kind)
    return out
