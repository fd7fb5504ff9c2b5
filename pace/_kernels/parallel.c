// The threads behind pace_run: a pool of helpers beside the calling thread. A call is done when its pieces are done,
// not when every helper has come by: one that the system has put aside, before it took a piece, is not waited for.
// (OpenMP's regions wait for all their threads: on a busy machine two of them were slower than one.)
#define _GNU_SOURCE
#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

enum {
    PIECES_PER_THREAD = 8, // on average: a slow thread then holds up the rest by an eighth of its share, at most
    ALIGNMENT = 64,
    MAX_THREADS = 1024,
    SPINS_BEFORE_SLEEP = 20000, // about half a millisecond: the layers of one forward pass come closer than that
    SPINS_BEFORE_YIELD = 2000,
};

// What the helpers work on. Only the thread that holds `caller` changes it, and only while the gate is shut and nobody
// is inside.
static struct {
    pace_worker worker;
    const void *args;
    size_t items, piece, threads, stride;
    char *scratch;
    _Alignas(ALIGNMENT) atomic_size_t next; // the first item that nobody has taken
    atomic_size_t next_thread;              // whose scratch nobody has taken; the caller's is 0
} job;

static pthread_mutex_t caller = PTHREAD_MUTEX_INITIALIZER;
static const unsigned SHUT = 1u << 31;
static _Alignas(ALIGNMENT) atomic_uint gate = 1u << 31; // SHUT, and how many helpers are inside
static _Alignas(ALIGNMENT) atomic_uint calls;           // counts jobs: a helper that sees it change looks at the gate

static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static atomic_int sleepers;

static size_t num_helpers;         // of the crew
static atomic_uint crew;           // which crew of helpers serves; those of an earlier one leave
static atomic_int asked_threads;   // by pace_set_num_threads; 0: nobody asks
static atomic_int default_threads; // where nobody asks; 0 until it is needed
static _Atomic(pace_hook) hook;

static void relax(void) { __builtin_ia32_pause(); }
static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

static int available_cpus(void) {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

// Read once: a program may change its environment while kernels run.
static int environment_threads(void) {
    static atomic_int found = -1;
    if (atomic_load(&found) < 0) {
        const char *variable = getenv("OMP_NUM_THREADS");
        const int wanted = variable ? atoi(variable) : 0;
        atomic_store(&found, wanted > 0 ? wanted : 0);
    }
    return atomic_load(&found);
}

int pace_asked_threads(void) {
    const int asked = atomic_load(&asked_threads);
    return asked ? asked : environment_threads();
}

int pace_num_threads(void) {
    const int asked = pace_asked_threads();
    if (asked) return asked;
    int count = atomic_load(&default_threads);
    if (count) return count;
    const int initial = available_cpus();
    return atomic_compare_exchange_strong(&default_threads, &count, initial) ? initial : count;
}
void pace_set_num_threads(int n) { atomic_store(&asked_threads, n); }
void pace_set_hook(pace_hook h) { atomic_store(&hook, h); }

// Every thread takes the next piece until none is left.
static void take_pieces(size_t thread) {
    char *scratch = job.scratch + job.stride * thread;
    size_t begin;
    while ((begin = atomic_fetch_add_explicit(&job.next, job.piece, memory_order_relaxed)) < job.items)
        job.worker(job.args, begin, smaller(begin + job.piece, job.items), scratch);
}

static bool enter(void) {
    unsigned seen = atomic_load_explicit(&gate, memory_order_relaxed);
    do {
        if (seen & SHUT) return false;
    } while (
        !atomic_compare_exchange_weak_explicit(&gate, &seen, seen + 1, memory_order_acquire, memory_order_relaxed));
    return true;
}

static unsigned next_call(unsigned last) {
    for (int spin = 0; spin < SPINS_BEFORE_SLEEP; spin++, relax()) {
        const unsigned now = atomic_load_explicit(&calls, memory_order_acquire);
        if (now != last) return now;
    }
    pthread_mutex_lock(&sleep_lock);
    atomic_fetch_add(&sleepers, 1);
    while (atomic_load(&calls) == last) pthread_cond_wait(&wake, &sleep_lock);
    atomic_fetch_sub(&sleepers, 1);
    pthread_mutex_unlock(&sleep_lock);
    return atomic_load(&calls);
}

// Whichever helpers come first take the threads' places of a call: any that is free will do.
static void *help(void *of_crew) {
    for (unsigned last = 0;;) {
        last = next_call(last);
        if (atomic_load(&crew) != (uintptr_t)of_crew) return NULL;
        if (!enter()) continue;
        const size_t thread = atomic_fetch_add_explicit(&job.next_thread, 1, memory_order_relaxed);
        if (thread < job.threads) take_pieces(thread);
        atomic_fetch_sub_explicit(&gate, 1, memory_order_release);
    }
    return NULL;
}

// Threads do not survive a fork, and whoever held a lock is gone.
static void forget_helpers(void) {
    num_helpers = 0;
    atomic_store(&gate, SHUT);
    atomic_store(&sleepers, 0);
    pthread_mutex_init(&caller, NULL);
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_cond_init(&wake, NULL);
}

static bool forgets;
static void prepare_for_fork(void) { forgets = pthread_atfork(NULL, NULL, forget_helpers) == 0; }

// To be asked before any lock that a fork could find taken.
static bool survives_fork(void) {
    static pthread_once_t prepared = PTHREAD_ONCE_INIT;
    pthread_once(&prepared, prepare_for_fork);
    return forgets;
}

// As many helpers as the system gives, up to `wanted`. The program's signals are for its own threads; a helper takes
// only those of its own faults.
static void raise_helpers(size_t wanted) {
    sigset_t blocked, before;
    sigfillset(&blocked);
    const int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    while (num_helpers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, &detached, help, (void *)(uintptr_t)atomic_load(&crew)) != 0) break;
        num_helpers++;
    }
    pthread_attr_destroy(&detached);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void call_helpers(void) {
    atomic_fetch_add(&calls, 1);
    if (atomic_load(&sleepers)) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleep_lock);
    }
}

// A helper of the crew before that has just seen itself in service may still help with one call: there is room for it.
void pace_renew_helpers(int threads) {
    atomic_store(&default_threads, threads);
    if (!survives_fork()) return;
    pthread_mutex_lock(&caller);
    atomic_fetch_add(&crew, 1);
    call_helpers();
    num_helpers = 0;
    raise_helpers(smaller((size_t)pace_num_threads(), MAX_THREADS) - 1);
    pthread_mutex_unlock(&caller);
}

// With `caller` held.
static void share(size_t threads) {
    if (num_helpers + 1 < threads) raise_helpers(threads - 1);
    atomic_store_explicit(&job.next, 0, memory_order_relaxed);
    atomic_store_explicit(&job.next_thread, 1, memory_order_relaxed);
    atomic_store_explicit(&gate, 0, memory_order_release);
    call_helpers();
    take_pieces(0);
    atomic_fetch_or_explicit(&gate, SHUT, memory_order_acquire);
    for (int spin = 0; atomic_load_explicit(&gate, memory_order_acquire) != SHUT; spin++)
        if (spin < SPINS_BEFORE_YIELD)
            relax();
        else
            sched_yield();
}

int pace_run(pace_worker worker, const void *args, size_t items, size_t grain, bool even, size_t scratch_bytes) {
    if (items == 0) return 0;
    if (grain == 0) grain = 1;
    const size_t stride = (scratch_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    size_t threads = smaller((size_t)pace_num_threads(), (items + grain - 1) / grain);
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    const pace_hook instead = atomic_load(&hook);
    if (instead) threads = 1;
    char *scratch = NULL;
    if (stride && !(scratch = aligned_alloc(ALIGNMENT, stride * threads))) return -1;

    // A second thread of the program that calls at the same time does its work itself.
    if (instead) {
        instead(worker, args, 0, items, scratch);
    } else if (threads == 1 || !survives_fork() || pthread_mutex_trylock(&caller) != 0) {
        worker(args, 0, items, scratch);
    } else {
        const size_t piece = even ? items / (threads * PIECES_PER_THREAD) : 0;
        job.worker = worker, job.args = args, job.items = items, job.piece = piece > grain ? piece : grain;
        job.threads = threads, job.stride = stride, job.scratch = scratch;
        share(threads);
        pthread_mutex_unlock(&caller);
    }
    free(scratch);
    return 0;
}
