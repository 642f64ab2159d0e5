/* Linear layers: a panel of the weight is turned over into the second cache, and multiplied by all the rows of a range. */
#include "threads.h"
#include "vector.h"

#define RANGE (72L * ROWS) /* rows that share one panel, at most */

#define AHEAD 64 /* weights that are fetched before they are needed */

typedef struct {
    const float *x, *bias, *residual; /* x (rows, depth), its rows `stride` apart */
    Weight weight;                    /* (outputs, or twice as many if gated, depth) */
    float *out;                       /* (rows, outputs) */
    long rows, depth, outputs, stride, ranges;
    int gated, threads;
    float *spaces; /* of each worker */
    long space;
} Job;

/* WIDE rows of the weight as (depth, WIDE). */
static void turn(const Job *job, long output, float *panel)
{
    for (long k = 0; k < job->depth; k += LANES)
        for (int j = 0; j < WIDE; j += LANES) {
            vec block[LANES];
            UNROLL for (int i = 0; i < LANES; i++) {
                long at = (output + j + i) * job->depth + k;
                fetch(job->weight, at + AHEAD);
                block[i] = weights(job->weight, at);
            }
            transpose(block);
            UNROLL for (int i = 0; i < LANES; i++) store(panel + (k + i) * WIDE + j, block[i]);
        }
}

/* x times the normal distribution's integral up to x; erf by Abramowitz and Stegun 7.1.26, to 1.5e-7. */
INLINE vec gelu(vec x)
{
    vec z = larger(x, -x) * 0.70710678f, t = 1.0f / (1.0f + z * 0.3275911f);
    vec y = t * 1.061405429f - 1.453152027f;
    y = y * t + 1.421413741f;
    y = y * t - 0.284496736f;
    y = (y * t + 0.254829592f) * t * exponential(-z * z) * 0.5f; /* what is missing to 1, halved */
    return larger(x, all(0)) - larger(x, -x) * y;
}

INLINE void finish(const Job *job, int count, long row, long output, const float *values, const float *gates)
{
    for (int i = 0; i < count; i++)
        for (int j = 0; j < WIDE; j += LANES) {
            long at = (row + i) * job->outputs + output + j;
            vec value = load(values + i * WIDE + j);
            if (job->bias) value += load(job->bias + output + j);
            if (job->gated) value *= gelu(load(gates + i * WIDE + j) + load(job->bias + job->outputs + output + j));
            if (job->residual) value += load(job->residual + at);
            store(job->out + at, value);
        }
}

/* The part of the weights that this worker is likely to turn next, to be fetched while a group of rows is multiplied. */
static const char *ahead(const Job *job, long item, long offset, long group)
{
    long output = (item + job->threads) / job->ranges * WIDE, bytes = size(job->weight);
    if (output == item / job->ranges * WIDE || output >= job->outputs || group * LINE >= WIDE * bytes) return 0;
    return (const char *)job->weight.numbers + ((offset + output) * bytes + group * LINE) * job->depth;
}

static void linear_item(void *data, long item, int worker)
{
    const Job *job = data;
    long output = item / job->ranges * WIDE, range = item % job->ranges;
    long begin = job->rows * range / job->ranges, end = job->rows * (range + 1) / job->ranges;
    float *panel = job->spaces + worker * job->space, *gate = panel + job->depth * WIDE;
    float values[ROWS * WIDE], gates[ROWS * WIDE];
    turn(job, output, panel);
    if (job->gated) turn(job, job->outputs + output, gate);
    for (long row = begin, group = 0; row < end; row += ROWS, group++) {
        int count = (int)MIN(ROWS, end - row);
        Product p = {job->x + row * job->stride, job->stride, panel, WIDE, job->depth, values, WIDE, 0, ahead(job, item, 0, group)};
        product(count, p);
        p.columns = gate, p.out = gates, p.ahead = ahead(job, item, job->outputs, group);
        if (job->gated) product(count, p);
        finish(job, count, row, output, values, gates);
    }
}

static void measure(Job *job, int threads)
{
    long panels = job->outputs / WIDE;
    job->space = job->depth * WIDE * (job->gated ? 2 : 1) + LANES;
    job->ranges = MAX((job->rows + RANGE - 1) / RANGE, MIN(4 * threads / panels, job->rows / (4 * ROWS)));
    job->ranges = MAX(1, job->ranges);
}

/* Floats of scratch that `linear` wants. */
long linear_scratch(long depth, int gated, int threads) { return threads * (depth * WIDE * (gated ? 2 : 1) + LANES); }

/* out = x weight^T + bias + residual; if gated, the first half of that times the GELU of the second. bias and residual may be
 * null, bias not if gated. Depth is a multiple of LANES, outputs of WIDE. */
void linear(const float *x, const void *weight, int half, const float *bias, const float *residual, float *out,
            const long *shape, int gated, int threads, float *scratch, Parallel parallel)
{
    Job job = {.x = x, .weight = {weight, half}, .bias = bias, .residual = residual, .out = out, .gated = gated, .threads = threads, .spaces = scratch};
    job.rows = shape[0], job.depth = shape[1], job.outputs = shape[2], job.stride = shape[3];
    measure(&job, threads);
    share(linear_item, &job, job.outputs / WIDE * job.ranges, threads, parallel);
}
