/* Work shared out among threads: those of OpenMP that PyTorch already has, so that none wait for another's. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */

typedef struct {
    void (*item)(void *job, long item, int worker);
    void *job;
    long items;
    atomic_long next;
    atomic_int workers;
} Crew;

static void work(void *data)
{
    Crew *crew = data;
    int worker = atomic_fetch_add(&crew->workers, 1);
    for (long item; (item = atomic_fetch_add(&crew->next, 1)) < crew->items;) crew->item(crew->job, item, worker);
}

static void *work_on_thread(void *data) { return work(data), (void *)0; }

/* Run `item` for 0, 1, ... items - 1, by at most `threads` workers; back when all are done. */
static void share(void (*item)(void *, long, int), void *job, long items, int threads, Parallel parallel)
{
    Crew crew = {item, job, items, 0, 0};
    if (threads > items) threads = (int)items;
    if (threads <= 1) {
        work(&crew);
    } else if (parallel) {
        parallel(work, &crew, (unsigned)threads, 0);
    } else {
        pthread_t others[64];
        int started = 0;
        while (started < threads - 1 && started < 64 && !pthread_create(others + started, 0, work_on_thread, &crew)) started++;
        work(&crew);
        while (started) pthread_join(others[--started], 0);
    }
}
