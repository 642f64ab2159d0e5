/* 3x3 convolutions of maps with a few channels, by the definition: the first of a network. */
#include <string.h>

#include "threads.h"
#include "vector.h"

typedef struct {
    const float *x, *weight, *bias; /* x (B, H, W, C); weight (9, C, O); bias (O) */
    float *out;                     /* (B, H, W, O) */
    long height, width, channels, outputs;
    float *spaces; /* of each worker: (W, 9, C) */
} Job;

/* One row of pixels. */
static void row_item(void *data, long item, int worker)
{
    const Job *job = data;
    long channels = job->channels, depth = 9 * channels, y = item % job->height, line = job->width * channels;
    float *seen = job->spaces + worker * job->width * depth, *out = job->out + item * job->width * job->outputs;
    for (long x = 0; x < job->width; x++)
        for (int k = 0; k < 9; k++) {
            long above = y + k / 3 - 1, beside = x + k % 3 - 1;
            int inside = above >= 0 && above < job->height && beside >= 0 && beside < job->width;
            const float *from = job->x + (item + k / 3 - 1) * line + beside * channels;
            for (long c = 0; c < channels; c++) seen[x * depth + k * channels + c] = inside ? from[c] : 0;
        }
    for (long x = 0; x < job->width; x++) memcpy(out + x * job->outputs, job->bias, sizeof(float) * job->outputs);
    for (long j = 0; j < job->outputs; j += WIDE)
        product(job->width, (Product){seen, depth, job->weight + j, job->outputs, depth, out + j, job->outputs, 1});
}

/* Floats of scratch that `conv_small_cin` wants. */
long conv_small_cin_scratch(long width, long channels, int threads) { return threads * width * 9 * channels; }

/* out = conv(x) + bias; outputs are a multiple of WIDE. shape: batch, height, width, channels, outputs. */
void conv_small_cin(const float *x, const float *weight, const float *bias, float *out, const long *shape, int threads,
                    float *scratch, Parallel parallel)
{
    Job job = {x, weight, bias, out, shape[1], shape[2], shape[3], shape[4], scratch};
    share(row_item, &job, shape[0] * shape[1], threads, parallel);
}
