// Work divided over threads by outputs. A kernel is a worker: it computes items [begin, end) of a call that is
// described by `args`, with `scratch` for its own use, and knows nothing of threads. So an item's arithmetic cannot
// depend on how many threads there are, and the same worker runs under a CPU emulator in the tests.
#pragma once
#include <stdbool.h>
#include <stddef.h>

typedef void (*pace_worker)(const void *args, size_t begin, size_t end, void *scratch);

enum pace_rung { PACE_RUNG_AVX2, PACE_RUNG_AVX512, PACE_NUM_RUNGS };

// What stands between the driver and a worker in tests: called instead of the worker when it is set.
typedef void (*pace_hook)(pace_worker worker, const void *args, size_t begin, size_t end, void *scratch);

int pace_num_threads(void);
void pace_set_num_threads(int num_threads); // 0: as many as OMP_NUM_THREADS or the CPUs say
int pace_asked_threads(void);               // by pace_set_num_threads or OMP_NUM_THREADS; 0: nobody asks
void pace_set_hook(pace_hook hook);

// Runs `worker` over all items, in pieces of at least `grain` items taken by whichever thread is free; of exactly so many
// where `even` is false, for items of uneven cost that come sorted, the dearest first. Each thread has
// `scratch_bytes` of 64-byte aligned scratch, not initialised. May be called from several threads at once, and after a
// fork. Returns 0, or -1 when scratch cannot be allocated.
int pace_run(pace_worker worker, const void *args, size_t items, size_t grain, bool even, size_t scratch_bytes);

// Helpers run where the thread that raised them may run, and take memory from where it does. This sends them away and has
// the calling thread raise others, after the call that is under way. `threads`: how many threads there are where nobody
// asks for a number; 0: as many as the calling thread has CPUs.
void pace_renew_helpers(int threads);
