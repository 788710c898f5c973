/* The thread pool: how the rows of a step are divided among OpenMP's threads.
 *
 * Rows are divided into groups. A thread takes tasks of its own group first, because what it computed
 * of those rows is likely in its own caches. (Measured: the median does not change, and slow runs are
 * less slow.) A thread whose group has no tasks left takes tasks of other groups, so that no thread
 * waits long for one that the system has stopped.
 */
#pragma once
#include <omp.h>

#include "native.h"

#define GROUP_ROWS 32 /* at least: each group reads all weights */
#define SOME_ROWS 16  /* of a task that is not a product */

/* Number of tasks of a phase and a group that are taken; alone in a cache line. */
typedef struct {
    int64_t taken;
    char rest[64 - sizeof(int64_t)];
} counter;

/* A thread of the pool. All threads pass the same phases in the same order. */
typedef struct {
    int64_t groups, home; /* its own group */
    int64_t threads;      /* of a group, about */
    counter *next;        /* [groups], of the phase to come */
} worker;

/* Where a thread is among the tasks of a phase. */
typedef struct {
    counter *counters;
    int64_t groups, group, tried;
} cursor;

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

static worker join_pool(int64_t groups, counter *counters) {
    int64_t threads = omp_get_num_threads();
    return (worker){groups, omp_get_thread_num() * groups / threads, threads / groups, counters};
}

static inline cursor begin_phase(worker *me) {
    cursor tasks = {me->next, me->groups, me->home, 0};
    me->next += me->groups;
    return tasks;
}

/* The next task of a phase over `rows` rows, `size` at a time, and `panels` panels; 0 when all are
 * taken. */
static inline int next_task(cursor *tasks, int64_t rows, int64_t size, int64_t panels, task *out) {
    while (tasks->tried < tasks->groups) {
        int64_t group = tasks->group, groups = tasks->groups;
        int64_t first = rows * group / groups, last = rows * (group + 1) / groups;
        int64_t chunks = (last - first + size - 1) / size, count = chunks * panels;
        int64_t index = __atomic_fetch_add(&tasks->counters[group].taken, 1, __ATOMIC_RELAXED);
        if (index < count) {
            int64_t begin = first + index % chunks * size;
            *out = (task){begin, begin + size < last ? begin + size : last, index / chunks,
                          index, count, first, last};
            return 1;
        }
        tasks->group = (group + 1) % groups;
        tasks->tried++;
    }
    return 0;
}

/* Wait for all threads, and add what the phase took to `spent`. */
static void end_phase(double *spent, double *since) {
#pragma omp barrier
    if (omp_get_thread_num() == 0) {
        double now = omp_get_wtime();
        *spent += now - *since;
        *since = now;
    }
}
