/* Vectors of floats, in the compiler's own extension: the widest that the processor has, and a product of matrices. */
#pragma once

#ifdef __AVX__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 14 /* of the left matrix at a time: ROWS * VECTORS sums, VECTORS columns and one row's value in 32 registers */
#define VECTORS 2
#elif defined(__AVX__)
#define LANES 8
#define ROWS 6
#define VECTORS 2
#else
#define LANES 4
#define ROWS 6
#define VECTORS 4
#endif
#define WIDE (LANES * VECTORS) /* columns of the right matrix at a time */
#define LINE 64                /* bytes that memory is fetched by */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec all(float a) { return a - (vec){0}; }
#if LANES == 16
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif LANES == 8
INLINE vec larger(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }
INLINE vec smaller(vec a, vec b) { return choose(a < b, a, b); }
#endif

typedef struct {
    const void *numbers; /* floats, or half-precision ones */
    int half;
} Weight;

/* Bytes of a weight. */
INLINE long size(Weight w) { return w.half ? 2 : 4; }

/* Fetch what lies at number i. */
INLINE void fetch(Weight w, long i) { __builtin_prefetch((const char *)w.numbers + i * size(w)); }

/* LANES weights from number i on. */
INLINE vec weights(Weight w, long i)
{
    if (!w.half) return load((const float *)w.numbers + i);
    const unsigned short *p = (const unsigned short *)w.numbers + i;
#if LANES == 16
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif LANES == 8
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    typedef _Float16 halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    return __builtin_convertvector(*(const halves *)p, vec);
#endif
}

/* e^x to 2 units in the last place; x is held within [-87, 88]. */
INLINE vec exponential(vec x)
{
    const vec magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    x = smaller(larger(x, all(-87.0f)), all(88.0f));
    vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return (vec)((ivec)y + (((ivec)shifted - (ivec)magic) << 23));
}

/* 2^x for x <= 0; below -126 it is 2^-126. */
INLINE vec power_of_two(vec x)
{
    const vec magic = all(12582912.0f);
    x = larger(x, all(-126.0f));
    vec shifted = x + magic, r = x - (shifted - magic);
    vec y = r * 1.535336188e-4f + 1.339887440e-3f;
    y = y * r + 9.618437357e-3f;
    y = y * r + 5.550332471e-2f;
    y = y * r + 2.402264791e-1f;
    y = y * r + 6.931472028e-1f;
    y = y * r + 1.0f;
    return (vec)((ivec)y + (((ivec)shifted - (ivec)magic) << 23));
}

INLINE vec silu(vec x) { return x / (1.0f + exponential(-x)); }

typedef struct {
    const float *rows; /* of the left matrix, `stride` apart */
    long stride;
    const float *columns; /* the right matrix, its rows `pitch` apart */
    long pitch, depth;
    float *out; /* its rows `width` apart */
    long width;
    int add; /* to what is there */
    const char *ahead; /* memory to fetch meanwhile, 64 bytes with each of `depth`; or null */
} Product;

/* `rows` rows of vectors * LANES columns; rows <= ROWS, vectors <= VECTORS, both known to the compiler. */
INLINE void multiply(int rows, int vectors, Product p)
{
    vec sums[ROWS][VECTORS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) sums[i][j] = p.add ? load(p.out + i * p.width + j * LANES) : (vec){0};
    for (long k = 0; k < p.depth; k++) {
        vec column[VECTORS];
        if (p.ahead) __builtin_prefetch(p.ahead + k * LINE);
        UNROLL for (int j = 0; j < vectors; j++) column[j] = load(p.columns + k * p.pitch + j * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            vec value = all(p.rows[i * p.stride + k]);
            UNROLL for (int j = 0; j < vectors; j++) sums[i][j] += value * column[j];
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) store(p.out + i * p.width + j * LANES, sums[i][j]);
}

/* The same for any number of rows, in groups that are as equal as they can be: few rows alone would wait for their sums. */
INLINE void multiply_all(long rows, int vectors, Product p)
{
    for (long groups = (rows + ROWS - 1) / ROWS, count; groups; groups--, rows -= count) {
        count = (rows + groups - 1) / groups;
        switch (count) {
#define GROUP(n) case n: multiply(n, vectors, p); break
#if ROWS > 6
            GROUP(14); GROUP(13); GROUP(12); GROUP(11); GROUP(10); GROUP(9); GROUP(8); GROUP(7);
#endif
            GROUP(6); GROUP(5); GROUP(4); GROUP(3); GROUP(2); GROUP(1);
        }
        p.rows += count * p.stride, p.out += count * p.width;
    }
}

static void product(long rows, Product p) { multiply_all(rows, VECTORS, p); } /* of WIDE columns */

/* LANES rows of LANES floats, turned over, by zipping the halves log2(LANES) times. */
INLINE void transpose(vec *rows)
{
#if LANES == 16
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif LANES == 8
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif
    for (int done = 1; done < LANES; done *= 2) {
        vec zipped[LANES];
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            zipped[2 * i] = LOW(rows[i], rows[i + LANES / 2]);
            zipped[2 * i + 1] = HIGH(rows[i], rows[i + LANES / 2]);
        }
        UNROLL for (int i = 0; i < LANES; i++) rows[i] = zipped[i];
    }
}
