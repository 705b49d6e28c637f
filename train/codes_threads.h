/* How a loop of codes.c is compiled, and how threads share its work. */
#ifndef CODES_THREADS_H
#define CODES_THREADS_H
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Where the loader can choose, each of these functions is compiled three times and the widest is taken. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif
#define INLINE static inline __attribute__((always_inline))

static inline size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* What threads do together: each calls `run`, and takes items until there are none. */
struct work {
    void (*run)(void *);
    size_t items;
    atomic_size_t taken;
    _Atomic(const char *) fault;
};

static const char MEMORY[] = "there is no memory for a step's products";
static const char SIZES[] = "the buffers' sizes, or the numbers in them, do not belong together";

static size_t take(struct work *work) { return atomic_fetch_add(&work->taken, 1); }
static void fail(struct work *work, const char *fault) { atomic_store(&work->fault, fault); }

static void *run_in_thread(void *all)
{
    ((struct work *)all)->run(all);
    return NULL;
}

/* all: a struct that begins with its work. torch's own team of threads does it where that is libgomp's: its threads
 * wait for their next work in a loop, and would be in the way of others. */
static void together(void *all, size_t threads)
{
    enum { MOST = 256 };
    struct work *work = all;
    static void (*_Atomic parallel)(void (*)(void *), void *, unsigned, unsigned);
    if (!parallel)
        parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (threads > 1 && parallel) {
        parallel(work->run, all, (unsigned)threads, 0);
        return;
    }
    pthread_t others[MOST];
    size_t started = 0;
    while (started + 1 < threads && started < MOST && !pthread_create(others + started, NULL, run_in_thread, all))
        started++;
    work->run(all);
    while (started)
        pthread_join(others[--started], NULL);
}

#endif
