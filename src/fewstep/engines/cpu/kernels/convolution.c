/* 3x3 convolutions of stride 1 with fewer products (arXiv:1509.09308): the schemes of winograd.py, whole.
 *
 * Maps lie as (batch, height, width, channels). A chunk of tiles goes through three steps, whose results stay in the
 * caches: what the tiles look at is normalised, activated and transformed; for some output channels at a time the filters
 * are transformed; these are multiplied point by point, transformed back and written.
 */
#include <string.h>

#include "threads.h"
#include "vector.h"

#define TILES (8 * ROWS)        /* multiplied by a panel of filters at a time, at most */
#define DEPTH 128               /* input channels of filters transformed at a time: a panel that fits the second cache */
#define PAD 16                  /* floats between rows, or powers of two would share sets of the cache */
#define BLOCK (2 * LANES)       /* input channels transformed at a time */
#define STRIP (2 * ROWS)        /* tiles that go through all steps at once */
#define FILTERS (256L * 256)    /* of all input and output channels, at most, for that */
#define PANEL (DEPTH * WIDE + PAD)
#define PRODUCTS (TILES * WIDE + PAD)

enum { WINOGRAD, STRICT, UPSAMPLED };

INLINE int step_of(int scheme) { return scheme == WINOGRAD ? 4 : 2; }      /* input samples from a tile to the next */
INLINE int samples_of(int scheme) { return step_of(scheme) + 2; }          /* that a tile looks at */
INLINE int outputs_of(int scheme) { return scheme == STRICT ? 2 : 4; }
INLINE int forms_of(int scheme) { return scheme == WINOGRAD ? 6 : 4; }     /* different transformed inputs */
INLINE int points_of(int scheme) { return scheme == WINOGRAD ? 6 : scheme == STRICT ? 4 : 5; } /* products */
INLINE int form_at(int scheme, int point) { return scheme == UPSAMPLED && point > 2 ? point - 1 : point; }

typedef struct {
    const float *x, *bias, *scale, *shift, *residual; /* bias (B, O); scale and shift (B, C) */
    Weight weight;                                    /* (O, C, 3, 3) */
    float *out;
    long batch, height, width, channels, outputs, bias_stride;
    long relu;              /* 1: the last step is max(x, 0) */
    long every, from;       /* of the outputs' rows and columns those are kept, from this one on */
    long down, across, left; /* rows of tiles of a picture, tiles in each of them, the number of the first */
    long first, last;       /* rows of tiles of this chunk, counted over all pictures */
    long ranges;            /* that the chunk's tiles are split into for each panel of output channels */
    float *transformed;     /* (forms, forms, tiles of the chunk, channels + PAD) */
    float *panels;          /* of all filters, where they are transformed beforehand */
    float *spaces;          /* of each worker */
    long space;
    int scheme;
} Job;

INLINE void input_transform(int scheme, const vec *x, int sx, vec *y, int sy)
{
    if (scheme == WINOGRAD) {
        vec even = x[4 * sx] - x[2 * sx], odd = 2 * (x[3 * sx] - x[sx]);
        vec even4 = x[4 * sx] - 4 * x[2 * sx], odd4 = x[3 * sx] - 4 * x[sx];
        y[0] = 4 * x[0] + (x[4 * sx] - 5 * x[2 * sx]);
        y[sy] = even4 + odd4;
        y[2 * sy] = even4 - odd4;
        y[3 * sy] = even + odd;
        y[4 * sy] = even - odd;
        y[5 * sy] = 4 * x[sx] + (x[5 * sx] - 5 * x[3 * sx]);
    } else {
        y[0] = x[0] - x[2 * sx];
        y[sy] = x[sx] + x[2 * sx];
        y[2 * sy] = x[2 * sx] - x[sx];
        y[3 * sy] = x[3 * sx] - x[sx];
    }
}

INLINE void weigh(int scheme, const vec *w, int sw, vec *y, int sy)
{
    vec a = w[0], b = w[sw], c = w[2 * sw];
    if (scheme == WINOGRAD) {
        vec low = (a + c) * (-1 / 6.0f), high = a * (1 / 24.0f) + c * (1 / 6.0f), sixth = b * (1 / 6.0f), twelfth = b * (1 / 12.0f);
        y[0] = a * 0.25f;
        y[sy] = low - sixth;
        y[2 * sy] = low + sixth;
        y[3 * sy] = high + twelfth;
        y[4 * sy] = high - twelfth;
        y[5 * sy] = c;
    } else if (scheme == STRICT) {
        vec even = (a + c) * 0.5f, odd = b * 0.5f;
        y[0] = a;
        y[sy] = even + odd;
        y[2 * sy] = even - odd;
        y[3 * sy] = c;
    } else {
        y[0] = a;
        y[sy] = (a + b + c) * 0.5f;
        y[2 * sy] = b * 0.5f;
        y[3 * sy] = (c - a) * 0.5f;
        y[4 * sy] = c;
    }
}

INLINE void output_transform(int scheme, const vec *m, int sm, vec *y, int sy)
{
    vec odd = m[sm] - m[2 * sm], even = m[sm] + m[2 * sm];
    if (scheme == WINOGRAD) {
        vec odd2 = m[3 * sm] - m[4 * sm], even2 = m[3 * sm] + m[4 * sm];
        y[0] = m[0] + even + even2;
        y[sy] = odd + 2 * odd2;
        y[2 * sy] = even + 4 * even2;
        y[3 * sy] = m[5 * sm] + odd + 8 * odd2;
    } else if (scheme == STRICT) {
        y[0] = m[0] + even;
        y[sy] = m[3 * sm] + odd;
    } else {
        vec middle = m[3 * sm];
        y[0] = m[0] + (odd - middle);
        y[sy] = odd + middle;
        y[2 * sy] = even + middle;
        y[3 * sy] = m[4 * sm] + (even - middle);
    }
}

/* `count` channels from `channel` on of the lines that a row of tiles looks at, activated, zeros around: (samples, width, count). */
static void look(const Job *job, long picture, long row, long channel, long count, float *window)
{
    int samples = samples_of(job->scheme), step = step_of(job->scheme);
    long wide = job->across * step + 2, top = row * step - 1, start = job->left * step - 1;
    long begin = MAX(0, start), end = MIN(job->width, start + wide);
    const float *scale = job->scale ? job->scale + picture * job->channels + channel : 0;
    const float *shift = job->scale ? job->shift + picture * job->channels + channel : 0;
    for (int i = 0; i < samples; i++, window += wide * count) {
        if (top + i < 0 || top + i >= job->height) {
            memset(window, 0, sizeof(float) * wide * count);
            continue;
        }
        const float *line = job->x + ((picture * job->height + top + i) * job->width) * job->channels + channel;
        memset(window, 0, sizeof(float) * (begin - start) * count);
        memset(window + (end - start) * count, 0, sizeof(float) * (start + wide - end) * count);
        for (long j = 0; j < count; j += LANES) {
            vec a = scale ? load(scale + j) : (vec){0}, b = scale ? load(shift + j) : (vec){0};
            for (long column = begin; column < end; column++) {
                vec value = load(line + column * job->channels + j);
                store(window + (column - start) * count + j, scale ? silu(value * a + b) : value);
            }
        }
    }
}

INLINE void input_tiles(int scheme, const Job *job, long tile, long channel, long count, const float *window)
{
    int samples = samples_of(scheme), step = step_of(scheme), forms = forms_of(scheme);
    long stride = job->channels + PAD, wide = job->across * step + 2, tiles = (job->last - job->first) * job->across;
    for (long across = 0; across < job->across; across++) {
        for (long j = 0; j < count; j += LANES) {
            vec seen[36], half[36], made[36];
            const float *from = window + across * step * count + j;
            for (int i = 0; i < samples; i++)
                for (int k = 0; k < samples; k++) seen[i * samples + k] = load(from + (i * wide + k) * count);
            for (int k = 0; k < samples; k++) input_transform(scheme, seen + k, samples, half + k, samples);
            for (int i = 0; i < forms; i++) input_transform(scheme, half + i * samples, 1, made + i * forms, 1);
            float *to = job->transformed + (tile + across) * stride + channel + j;
            for (int i = 0; i < forms * forms; i++) store(to + i * tiles * stride, made[i]);
        }
    }
}

/* BLOCK channels of one row of tiles. */
static void input_row(const Job *job, long row, long channel, float *window)
{
    long picture = (job->first + row) / job->down, count = MIN(BLOCK, job->channels - channel);
    look(job, picture, (job->first + row) % job->down, channel, count, window);
    switch (job->scheme) {
    case WINOGRAD: input_tiles(WINOGRAD, job, row * job->across, channel, count, window); break;
    default: input_tiles(STRICT, job, row * job->across, channel, count, window); /* UPSAMPLED has the same four forms */
    }
}

/* One row of tiles and BLOCK channels of the first step. */
static void input_item(void *data, long item, int worker)
{
    const Job *job = data;
    long blocks = (job->channels + BLOCK - 1) / BLOCK;
    input_row(job, item / blocks, item % blocks * BLOCK, job->spaces + worker * job->space);
}

/* DEPTH input channels from `first` on of the filters of WIDE output channels: (points, points, DEPTH, WIDE). */
INLINE void weigh_panel(int scheme, const Job *job, long output, long first, float *panel)
{
    int points = points_of(scheme);
    for (long channel = first; channel < MIN(first + DEPTH, job->channels); channel += LANES) {
        vec taps[9 * LANES];
        for (int j = 0; j < VECTORS; j++) {
            for (int k = 0; k < 9; k++) { /* LANES filters' 9 * LANES numbers each, turned over */
                long from = ((output + j * LANES) * job->channels + channel) * 9 + k * LANES;
                for (int i = 0; i < LANES; i++) {
                    long at = from + i * job->channels * 9;
                    fetch(job->weight, at + 9 * LANES);
                    taps[k * LANES + i] = weights(job->weight, at);
                }
                transpose(taps + k * LANES);
            }
            for (int c = 0; c < LANES; c++) {
                vec half[18], made[36];
                for (int k = 0; k < 3; k++) weigh(scheme, taps + 9 * c + k, 3, half + k, 3);
                for (int i = 0; i < points; i++) weigh(scheme, half + 3 * i, 1, made + points * i, 1);
                float *to = panel + (channel - first + c) * WIDE + j * LANES;
                for (int i = 0; i < points * points; i++) store(to + i * PANEL, made[i]);
            }
        }
    }
}

/* How many of the first n rows or columns are kept, and from which on of those that begin at `start`. */
INLINE long kept(const Job *job, long n) { return (n - job->from + job->every - 1) / job->every; }
INLINE int first(const Job *job, long start) { return (int)((job->from - start % job->every + job->every) % job->every); }

INLINE void write_tile(int scheme, const Job *job, long tile, long output, const float *products)
{
    int points = points_of(scheme), outputs = outputs_of(scheme), scale = outputs / step_of(scheme);
    long row = job->first + tile / job->across, across = tile % job->across, picture = row / job->down;
    long height = job->height * scale, width = job->width * scale, top = row % job->down * outputs, left = (job->left + across) * outputs;
    long kept_rows = kept(job, height), kept_columns = kept(job, width);
    for (int j = 0; j < WIDE; j += LANES) {
        vec seen[36], half[24], made[16];
        for (int i = 0; i < points * points; i++) seen[i] = load(products + i * PRODUCTS + j);
        for (int k = 0; k < points; k++) output_transform(scheme, seen + k, points, half + k, points);
        for (int i = 0; i < outputs; i++) output_transform(scheme, half + i * points, 1, made + i * outputs, 1);
        vec bias = job->bias ? load(job->bias + picture * job->bias_stride + output + j) : (vec){0};
        for (int i = first(job, top); i < MIN(outputs, height - top); i += job->every)
            for (int k = first(job, left); k < MIN(outputs, width - left); k += job->every) {
                long y = picture * kept_rows + kept(job, top + i), x = kept(job, left + k);
                long at = (y * kept_columns + x) * job->outputs + output + j;
                vec value = made[i * outputs + k] + bias;
                if (job->residual) value += load(job->residual + at);
                if (job->relu) value = larger(value, all(0));
                store(job->out + at, value);
            }
    }
}

/* DEPTH input channels from `channel` on of the tiles from `begin` to `end`, by their filters. */
INLINE void multiply_points(int scheme, const Job *job, long begin, long end, long channel, const float *panel, float *products)
{
    int points = points_of(scheme), forms = forms_of(scheme);
    long stride = job->channels + PAD, tiles = (job->last - job->first) * job->across;
    for (int p = 0; p < points * points; p++) {
        long form = form_at(scheme, p / points) * forms + form_at(scheme, p % points);
        product(end - begin, (Product){job->transformed + (form * tiles + begin) * stride + channel, stride, panel + p * PANEL, WIDE,
                                       MIN(DEPTH, job->channels - channel), products + p * PRODUCTS, WIDE, channel > 0});
    }
}

INLINE void output_tiles(int scheme, const Job *job, long output, long begin, long end, float *panel, float *products)
{
    for (long channel = 0; channel < job->channels; channel += DEPTH) {
        weigh_panel(scheme, job, output, channel, panel);
        multiply_points(scheme, job, begin, end, channel, panel, products);
    }
    for (long tile = begin; tile < end; tile++) write_tile(scheme, job, tile, output, products + (tile - begin) * WIDE);
}

/* WIDE output channels of a range of at most TILES tiles. */
static void output_item(void *data, long item, int worker)
{
    const Job *job = data;
    long tiles = (job->last - job->first) * job->across, output = item / job->ranges * WIDE, range = item % job->ranges;
    long begin = tiles * range / job->ranges, end = tiles * (range + 1) / job->ranges;
    float *products = job->spaces + worker * job->space, *panel = products + 36 * PRODUCTS;
    switch (job->scheme) {
    case WINOGRAD: output_tiles(WINOGRAD, job, output, begin, end, panel, products); break;
    case STRICT: output_tiles(STRICT, job, output, begin, end, panel, products); break;
    default: output_tiles(UPSAMPLED, job, output, begin, end, panel, products);
    }
}

/* Where filters are few, all of them are transformed beforehand, and a strip of tiles goes through all steps at once: what
 * is transformed never leaves the second cache, and one core reads memory while another multiplies. */
static int in_strips(const Job *job, int threads)
{
    long tiles = job->batch * job->down * job->across;
    return job->scheme == WINOGRAD && job->channels * job->outputs <= FILTERS && tiles >= 8L * STRIP * threads;
}

static long depths(const Job *job) { return (job->channels + DEPTH - 1) / DEPTH; }
static long panels(const Job *job) { return job->outputs / WIDE * depths(job); }

static void panel_item(void *data, long item, int worker)
{
    const Job *job = data;
    long blocks = depths(job);
    (void)worker;
    weigh_panel(WINOGRAD, job, item / blocks * WIDE, item % blocks * DEPTH, job->panels + item * 36 * PANEL);
}

static void strip_item(void *data, long item, int worker)
{
    const Job *job = data;
    Job strip = *job;
    long strips = (job->across + STRIP - 1) / STRIP, part = item % strips;
    strip.first = item / strips, strip.last = strip.first + 1;
    strip.left = job->across * part / strips, strip.across = job->across * (part + 1) / strips - strip.left;
    strip.transformed = job->spaces + worker * job->space;
    float *space = strip.transformed + 36L * strip.across * (job->channels + PAD);
    for (long channel = 0; channel < job->channels; channel += BLOCK) input_row(&strip, 0, channel, space);
    const float *panel = job->panels;
    for (long output = 0; output < job->outputs; output += WIDE) {
        for (long channel = 0; channel < job->channels; channel += DEPTH, panel += 36 * PANEL)
            multiply_points(WINOGRAD, &strip, 0, strip.across, channel, panel, space);
        for (long tile = 0; tile < strip.across; tile++) write_tile(WINOGRAD, &strip, tile, output, space + tile * WIDE);
    }
}

/* Rows of tiles whose transformed input is about `chunk` floats: at least one. */
static long chunk_rows(const Job *job, long chunk)
{
    long forms = forms_of(job->scheme), floats = forms * forms * job->across * (job->channels + PAD);
    return MAX(1, MIN(chunk / floats, job->batch * job->down));
}

static void measure(Job *job, int threads)
{
    int step = step_of(job->scheme);
    job->down = (job->height + step - 1) / step;
    job->across = (job->width + step - 1) / step;
    int strips = in_strips(job, threads);
    long window = samples_of(job->scheme) * ((strips ? STRIP : job->across) * step + 2) * BLOCK;
    long transformed = strips ? 36L * STRIP * (job->channels + PAD) : 0;
    job->space = transformed + MAX(window, 36L * (PRODUCTS + PANEL)) + PAD;
}

/* Floats of scratch that `convolve` wants. */
long convolution_scratch(const long *shape, int scheme, int threads, long chunk)
{
    Job job = {.batch = shape[0], .height = shape[1], .width = shape[2], .channels = shape[3], .scheme = scheme};
    job.outputs = shape[4];
    measure(&job, threads);
    if (in_strips(&job, threads)) return panels(&job) * 36 * PANEL + threads * job.space;
    long forms = forms_of(scheme);
    return forms * forms * chunk_rows(&job, chunk) * job.across * (job.channels + PAD) + threads * job.space;
}

/* out = conv(silu(x * scale + shift)) + bias + residual; all but x, weight and out may be null. shape: batch, height,
 * width, channels, outputs, from one picture's bias to the next, which rows and columns are kept: every second, say,
 * from the first or the second on, and whether ReLU is applied. Channels are a multiple of LANES, outputs of WIDE. */
void convolve(const float *x, const void *weight, int half, const float *bias, const float *scale, const float *shift,
              const float *residual, float *out, const long *shape, int scheme, int threads, long chunk, float *scratch,
              Parallel parallel)
{
    Job job = {.x = x, .weight = {weight, half}, .bias = bias, .scale = scale, .shift = shift, .residual = residual, .out = out};
    job.batch = shape[0], job.height = shape[1], job.width = shape[2], job.channels = shape[3], job.outputs = shape[4];
    job.bias_stride = shape[5], job.every = shape[6], job.from = shape[7], job.relu = shape[8];
    job.scheme = scheme;
    measure(&job, threads);
    if (in_strips(&job, threads)) {
        job.panels = scratch, job.spaces = scratch + panels(&job) * 36 * PANEL;
        share(panel_item, &job, panels(&job), threads, parallel);
        share(strip_item, &job, job.batch * job.down * ((job.across + STRIP - 1) / STRIP), threads, parallel);
        return;
    }
    long rows = chunk_rows(&job, chunk), forms = forms_of(scheme), all_rows = job.batch * job.down;
    job.transformed = scratch;
    job.spaces = scratch + forms * forms * rows * job.across * (job.channels + PAD);
    for (job.first = 0; job.first < all_rows; job.first = job.last) {
        job.last = MIN(job.first + rows, all_rows);
        long wides = job.outputs / WIDE, tiles = (job.last - job.first) * job.across;
        job.ranges = MAX((tiles + TILES - 1) / TILES, MIN(2 * threads / wides, tiles / ROWS));
        share(input_item, &job, (job.last - job.first) * ((job.channels + BLOCK - 1) / BLOCK), threads, parallel);
        share(output_item, &job, wides * job.ranges, threads, parallel);
    }
}

typedef struct {
    const float *x;
    float *out;
    long channels, pixels, lines; /* of a picture, of an item */
} Sums;

static void sum_item(void *data, long item, int worker)
{
    const Sums *job = data;
    long items = (job->pixels + job->lines - 1) / job->lines, first = item % items * job->lines;
    const float *x = job->x + (item / items * job->pixels + first) * job->channels;
    float *out = job->out + item * 2 * job->channels;
    (void)worker;
    for (long j = 0; j < job->channels; j += LANES) {
        vec total = {0}, squares = {0};
        for (long i = 0; i < MIN(job->lines, job->pixels - first); i++) {
            vec value = load(x + i * job->channels + j);
            total += value;
            squares += value * value;
        }
        store(out + j, total);
        store(out + job->channels + j, squares);
    }
}

/* Sums, and sums of squares, of each channel of x (batch, pixels, channels) over `lines` pixels at a time: out (batch,
 * items, 2, channels). */
void sums(const float *x, float *out, long batch, long pixels, long channels, long lines, int threads, Parallel parallel)
{
    Sums job = {x, out, channels, pixels, lines};
    share(sum_item, &job, batch * ((pixels + lines - 1) / lines), threads, parallel);
}

/* What the channels of a convolution or linear layer are multiples of, on the way in and on the way out. */
long lanes(void) { return LANES; }
long wide(void) { return WIDE; }
