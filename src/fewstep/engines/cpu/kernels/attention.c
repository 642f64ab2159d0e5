/* Softmax attention, a block of queries and a block of keys at a time (arXiv:2205.14135), out of the caches. */
#include <string.h>

#include "threads.h"
#include "vector.h"

#define QUERIES (4 * ROWS)
#define KEYS (512 / WIDE * WIDE)
#define NOWHERE (-1e30f) /* a score that leaves nothing of its key */

typedef struct {
    const float *q, *k, *v; /* (B, N or M, heads * width), tokens `*_stride` apart, pictures one after the other */
    float *out;             /* (B, N, heads * width) */
    long batch, queries, keys, heads, width, q_stride, k_stride, v_stride;
    long panels, padded;    /* of WIDE keys; `width` in whole vectors */
    float *turned;          /* keys (B, heads, panels, width, WIDE) */
    float *values;          /* (B, heads, panels * WIDE, padded) */
    float *spaces;          /* of each worker */
    long space;
} Job;

/* LANES numbers from p on, `count` of which are there. */
INLINE vec some(const float *p, long count)
{
    if (count >= LANES) return load(p);
    float numbers[LANES] = {0};
    for (long i = 0; i < count; i++) numbers[i] = p[i];
    return load(numbers);
}

/* WIDE keys of one head turned over and scaled, and their values in whole vectors; zeros where there are no more. */
static void pack_item(void *data, long item, int worker)
{
    const Job *job = data;
    long head = item / job->panels, first = item % job->panels * WIDE, start = head / job->heads * job->keys + first;
    long offset = head % job->heads * job->width, there = job->keys - first;
    float *turned = job->turned + item * job->width * WIDE, *values = job->values + item * WIDE * job->padded;
    float scale = 1.44269504f / __builtin_sqrtf((float)job->width); /* the exponential is a power of two */
    (void)worker;
    for (long j = 0; j < job->width; j += LANES) {
        for (int k = 0; k < WIDE; k += LANES) {
            vec block[LANES];
            for (int i = 0; i < LANES; i++) {
                const float *key = job->k + (start + k + i) * job->k_stride + offset + j;
                block[i] = (k + i < there ? some(key, job->width - j) : (vec){0}) * scale;
            }
            transpose(block);
            for (int i = 0; i < MIN(LANES, job->width - j); i++) store(turned + (j + i) * WIDE + k, block[i]);
        }
        for (int i = 0; i < WIDE; i++) {
            const float *value = job->v + (start + i) * job->v_stride + offset + j;
            store(values + i * job->padded + j, i < there ? some(value, job->width - j) : (vec){0});
        }
    }
}

INLINE float largest(vec v)
{
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = MAX(most, v[i]);
    return most;
}

INLINE float total(vec v)
{
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

/* Scores of one query, as powers of two, to weights that are not divided by their sum yet; what came before is scaled to
 * the new largest. */
INLINE void soften(float *scores, long count, float *most, float *sum, float *mixed, long padded)
{
    vec high = all(*most);
    for (long i = 0; i < count; i += LANES) high = larger(load(scores + i), high);
    float now = largest(high), kept = power_of_two(all(*most - now))[0];
    vec added = {0};
    for (long i = 0; i < count; i += LANES) {
        vec weight = power_of_two(load(scores + i) - now);
        store(scores + i, weight);
        added += weight;
    }
    *sum = *sum * kept + total(added);
    if (now > *most)
        for (long j = 0; j < padded; j += LANES) store(mixed + j, load(mixed + j) * kept);
    *most = now;
}

INLINE void mix(const Job *job, long queries, const float *scores, const float *values, long count, float *mixed)
{
    Product p = {scores, KEYS, values, job->padded, count, mixed, job->padded, 1};
    long j = 0;
    for (; j + WIDE <= job->padded; j += WIDE, p.columns += WIDE, p.out += WIDE) product(queries, p);
    for (; j < job->padded; j += LANES, p.columns += LANES, p.out += LANES) multiply_all(queries, 1, p);
}

/* QUERIES queries of one head. */
static void attend_item(void *data, long item, int worker)
{
    const Job *job = data;
    long blocks = (job->queries + QUERIES - 1) / QUERIES, head = item / blocks, first = item % blocks * QUERIES;
    long queries = MIN(QUERIES, job->queries - first), start = head / job->heads * job->queries + first;
    const float *q = job->q + start * job->q_stride + head % job->heads * job->width;
    float *scores = job->spaces + worker * job->space, *mixed = scores + QUERIES * KEYS;
    float most[QUERIES], sums[QUERIES];
    for (int i = 0; i < QUERIES; i++) most[i] = NOWHERE, sums[i] = 0;
    memset(mixed, 0, sizeof(float) * QUERIES * job->padded);
    for (long key = 0; key < job->panels * WIDE; key += KEYS) {
        long count = MIN(KEYS, job->panels * WIDE - key), panel = head * job->panels + key / WIDE;
        for (long k = 0; k < count; k += WIDE, panel++)
            product(queries, (Product){q, job->q_stride, job->turned + panel * job->width * WIDE, WIDE, job->width, scores + k, KEYS, 0});
        for (int i = 0; i < queries; i++) {
            for (long k = job->keys - key; k < count; k++) scores[i * KEYS + k] = NOWHERE;
            soften(scores + i * KEYS, count, most + i, sums + i, mixed + i * job->padded, job->padded);
        }
        mix(job, queries, scores, job->values + (head * job->panels * WIDE + key) * job->padded, count, mixed);
    }
    for (int i = 0; i < queries; i++) {
        float *out = job->out + ((start + i) * job->heads + head % job->heads) * job->width;
        for (long j = 0; j < job->width; j++) out[j] = mixed[i * job->padded + j] / sums[i];
    }
}

static void measure(Job *job, const long *shape)
{
    job->batch = shape[0], job->queries = shape[1], job->keys = shape[2], job->heads = shape[3], job->width = shape[4];
    job->q_stride = shape[5], job->k_stride = shape[6], job->v_stride = shape[7];
    job->panels = (job->keys + WIDE - 1) / WIDE;
    job->padded = (job->width + LANES - 1) / LANES * LANES;
    job->space = QUERIES * (KEYS + job->padded) + LANES;
}

/* Floats of scratch that `attend` wants. */
long attention_scratch(const long *shape, int threads)
{
    Job job = {0};
    measure(&job, shape);
    return job.batch * job.heads * job.panels * WIDE * (job.width + job.padded) + threads * job.space;
}

/* out = softmax(q k^T / sqrt(width)) v for each head. shape: batch, queries, keys, heads, width, and the strides of q, k, v. */
void attend(const float *q, const float *k, const float *v, float *out, const long *shape, int threads, float *scratch, Parallel parallel)
{
    Job job = {.q = q, .k = k, .v = v, .out = out};
    measure(&job, shape);
    job.turned = scratch;
    job.values = job.turned + job.batch * job.heads * job.panels * WIDE * job.width;
    job.spaces = job.values + job.batch * job.heads * job.panels * WIDE * job.padded;
    share(pack_item, &job, job.batch * job.heads * job.panels, threads, parallel);
    share(attend_item, &job, job.batch * job.heads * ((job.queries + QUERIES - 1) / QUERIES), threads, parallel);
}
