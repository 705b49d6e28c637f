/* Threads of the OpenMP runtime that the process has loaded already, which is torch's: between the parts of a forward
 * pass they wait without letting go of their processors, and others would have to push them aside. */
#include <dlfcn.h>

/* `work(of)` by so many threads at once, each of which takes its share; by the calling one where nobody has loaded a
 * runtime. */
static void work_together(void (*work)(void *), void *of, unsigned threads)
{
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = NULL;
    void *found = threads > 1 ? dlsym(RTLD_DEFAULT, "GOMP_parallel") : NULL; /* LLVM's has it under this name, too */
    memcpy(&parallel, &found, sizeof parallel);
    if (parallel)
        parallel(work, of, threads, 0);
    else
        work(of);
}
