/* How the rows of a step are shared out among threads.
 *
 * Rows are cut into groups, and a thread takes tasks of its own group as long as there are any: what
 * it made of those rows is likely in its own caches. Measured: no change of the median, but slow runs
 * were less slow. A thread without work takes tasks of other groups, so that nobody waits long for
 * one that the system has stopped.
 */
#pragma once
#include <omp.h>

#include "native.h"

#define GROUP_ROWS 32 /* at least: each group reads all weights */
#define SOME_ROWS 16  /* of a task that is not a product */

/* Tasks of a phase and a group that are taken, alone in a line of the caches. */
typedef struct {
    int64_t taken;
    char rest[64 - sizeof(int64_t)];
} counter;

/* A thread of the team. All pass the same phases in the same order. */
typedef struct {
    int64_t groups, home; /* its own group */
    int64_t threads;      /* of a group, about */
    counter *next;        /* [groups], of the phase to come */
} worker;

/* A thread's way through the tasks of a phase. */
typedef struct {
    counter *counters;
    int64_t groups, group, tried;
} way;

/* Rows begin .. end - 1 and a panel; `index` of `count` tasks of the group whose rows are first ..
 * last - 1. */
typedef struct {
    int64_t begin, end, panel;
    int64_t index, count, first, last;
} task;

static int64_t groups_of(int64_t rows) {
    int64_t threads = omp_get_max_threads(), most = rows / GROUP_ROWS;
    return most < 1 ? 1 : most < threads ? most : threads;
}

static worker join(int64_t groups, counter *counters) {
    int64_t threads = omp_get_num_threads();
    return (worker){groups, omp_get_thread_num() * groups / threads, threads / groups, counters};
}

static inline way enter(worker *me) {
    way through = {me->next, me->groups, me->home, 0};
    me->next += me->groups;
    return through;
}

/* The next task of a phase over `rows` rows, `size` at a time, and `panels` panels; 0 when all are
 * taken. */
static inline int next_task(way *through, int64_t rows, int64_t size, int64_t panels, task *out) {
    while (through->tried < through->groups) {
        int64_t group = through->group, groups = through->groups;
        int64_t first = rows * group / groups, last = rows * (group + 1) / groups;
        int64_t chunks = (last - first + size - 1) / size, count = chunks * panels;
        int64_t index = __atomic_fetch_add(&through->counters[group].taken, 1, __ATOMIC_RELAXED);
        if (index < count) {
            int64_t begin = first + index % chunks * size;
            *out = (task){begin, begin + size < last ? begin + size : last, index / chunks,
                          index, count, first, last};
            return 1;
        }
        through->group = (group + 1) % groups;
        through->tried++;
    }
    return 0;
}

/* Wait for all threads, and add what the phase took to `spent`. */
static void leave(double *spent, double *since) {
#pragma omp barrier
    if (omp_get_thread_num() == 0) {
        double now = omp_get_wtime();
        *spent += now - *since;
        *since = now;
    }
}
