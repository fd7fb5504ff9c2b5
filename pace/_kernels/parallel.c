#include "parallel.h"

#include <omp.h>
#include <stdlib.h>

// Pieces handed to each thread, on average: enough that a thread that was descheduled does not hold up the
// rest.
enum { PIECES_PER_THREAD = 8, ALIGNMENT = 64 };

static int num_threads = 0;
static pace_hook hook = NULL;

int pace_num_threads(void) {
    return num_threads > 0 ? num_threads : omp_get_max_threads();
}
void pace_set_num_threads(int n) {
    num_threads = n;
}
void pace_set_hook(pace_hook h) {
    hook = h;
}

static void call(pace_worker worker, const void *args, size_t begin, size_t end, void *scratch) {
    if (hook)
        hook(worker, args, begin, end, scratch);
    else
        worker(args, begin, end, scratch);
}

static size_t smaller(size_t a, size_t b) {
    return a < b ? a : b;
}

// Every thread takes the next piece until none is left.
static void share(pace_worker worker, const void *args, size_t items, size_t grain, size_t threads,
                  char *scratch, size_t stride) {
    size_t piece = items / (threads * PIECES_PER_THREAD);
    if (piece < grain) piece = grain;
    size_t next = 0;
#pragma omp parallel num_threads((int)threads)
    {
        char *mine = scratch + stride * (size_t)omp_get_thread_num();
        size_t begin;
        while ((begin = __atomic_fetch_add(&next, piece, __ATOMIC_RELAXED)) < items)
            worker(args, begin, smaller(begin + piece, items), mine);
    }
}

int pace_run(pace_worker worker, const void *args, size_t items, size_t grain, size_t scratch_bytes) {
    if (items == 0) return 0;
    if (grain == 0) grain = 1;
    size_t stride = (scratch_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    size_t threads = hook ? 1 : smaller((size_t)pace_num_threads(), (items + grain - 1) / grain);
    char *scratch = NULL;
    if (stride && !(scratch = aligned_alloc(ALIGNMENT, stride * threads))) return -1;

    if (threads == 1)
        call(worker, args, 0, items, scratch);
    else
        share(worker, args, items, grain, threads, scratch, stride);
    free(scratch);
    return 0;
}
