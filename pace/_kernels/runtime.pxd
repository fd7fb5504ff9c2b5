# What every binding shares: the rung in use, the parallel driver, and the checks that turn arrays into pointers.
cimport numpy as cnp

cdef extern from "parallel.h" nogil:
    ctypedef void (*pace_worker)(const void *args, size_t begin, size_t end, void *scratch) noexcept

# Kinds of element, as the C side numbers them (simd/elements.h).
cdef enum Kind:
    F32 = 0
    BF16 = 1

# even=False: the items differ in cost, and come sorted.
cdef int run(
    const pace_worker *workers, const void *args, size_t items, size_t grain, size_t scratch_bytes, bint even=*
) except -1

# That a call of `run` is divided over, at most.
cdef int num_threads() noexcept nogil

cdef bint is_native(cnp.ndarray array, int typenum) noexcept
cdef int check_type(cnp.ndarray array, str name, int typenum) except -1
cdef int kind_of(cnp.ndarray array, str name) except -1
cdef int check_rows(cnp.ndarray array, str name, Py_ssize_t columns) except -1
cdef int check_heads(cnp.ndarray array, str name, Py_ssize_t tokens, Py_ssize_t head_dim) except -1
cdef int check_vector(cnp.ndarray array, str name, Py_ssize_t length, int typenum) except -1
cdef int check_kind(cnp.ndarray array, str name, int kind) except -1
cdef int check_writeable(cnp.ndarray array, str name) except -1
cdef int check_apart(cnp.ndarray array, str name, cnp.ndarray other, str other_name) except -1
cdef int check_output_rows(cnp.ndarray array, str name, Py_ssize_t rows, Py_ssize_t columns, int kind) except -1
cdef cnp.ndarray empty_rows(Py_ssize_t rows, Py_ssize_t columns, int kind)
cdef cnp.ndarray output_rows(object out, Py_ssize_t rows, Py_ssize_t columns, int kind)
