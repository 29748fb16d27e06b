/* The passes over parameters of kernels.py, those over gradients of dither.py, and the counting of votes of counting.py, for
   CPUs; each reads and writes its memory once.

   Every operation is rounded as the formulas there stand: no contraction (-ffp-contract=off), no reordering. `hyper` is
   beta1, 1 - beta1, beta2, 1 - beta2, lr, weight_decay. A block is 32 rows of 32 lanes: bit k of word j is row k, lane j. */

#include <stdint.h>

#define LANES 32
#define BLOCK (LANES * LANES)
#define PARALLEL _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")

/* So many places of a pass's tensors are worked on side by side: one alone does not keep the memory busy. */
#define STREAMS 4

/* Of a decision: its highest level is at most that many bits long. */
#define MOST_PLANES 16

typedef uint16_t bfloat16;

static inline float from_bits(uint32_t bits) {
    union { uint32_t bits; float value; } both = {bits};
    return both.value;
}

static inline uint32_t to_bits(float value) {
    union { float value; uint32_t bits; } both = {value};
    return both.bits;
}

static inline float read_float(const float *place) { return *place; }
static inline float read_bfloat16(const bfloat16 *place) { return from_bits((uint32_t)*place << 16); }

static inline void write_float(float *place, float value, uint32_t element, uint32_t seed) { *place = value; }

/* As of hashing.py. */
static inline uint32_t scatter(uint32_t hash) {
    hash = (hash ^ (hash >> 16)) * 0x7feb352du;
    hash = (hash ^ (hash >> 15)) * 0x846ca68bu;
    return hash ^ (hash >> 16);
}

/* As rounding.py: a hash of the element carries into the upper half. */
static inline void write_bfloat16(bfloat16 *place, float value, uint32_t element, uint32_t seed) {
    *place = (bfloat16)((to_bits(value) + (scatter(element ^ seed) & 0xffff)) >> 16);
}

/* To have what comes a block later underway: Intel's hardware looks no further than the page of 4 KiB, a block of floats.
   On an AMD EPYC of Zen 4, a step took half as long again with it: all streams, and what they ask for, fall into one set
   of its first cache, which has 8 ways. CC="cc -DPREFETCH=1" asks all the same. */
#ifndef PREFETCH
#if defined(__znver1__) || defined(__znver2__) || defined(__znver3__) || defined(__znver4__) || defined(__znver5__)
#define PREFETCH 0
#else
#define PREFETCH 1
#endif
#endif

static inline void prefetch(const void *from, int bytes) {
    for (int line = 0; PREFETCH && line < bytes; line += 64) __builtin_prefetch((const char *)from + line);
}

static inline uint32_t vote_of(float direction, uint32_t zero_vote) {
    return (direction > 0) | ((direction == 0) & zero_vote);
}

/* Blocks `first`, `first + apart` and so on, one a stream. */
#define VOTE(TYPE, NAME, MOVES)                                                                                        \
    static inline void NAME##_blocks(const TYPE *restrict gradient, float *restrict momentum,                          \
                                     const float *restrict hyper, const uint32_t *zero, int32_t *restrict words,       \
                                     int64_t first, int64_t apart, int streams) {                                      \
        uint32_t packed[STREAMS][LANES] = {{0}};                                                                       \
        for (int row = 0; row < LANES; row++)                                                                          \
            for (int stream = 0; stream < streams; stream++) {                                                         \
                int64_t start = (first + stream * apart) * BLOCK + row * LANES;                                        \
                const TYPE *g = gradient + start;                                                                      \
                float *m = momentum + start;                                                                           \
                prefetch(g + BLOCK, LANES * sizeof *g);                                                                \
                prefetch(m + BLOCK, LANES * sizeof *m);                                                                \
                for (int lane = 0; lane < LANES; lane++) {                                                             \
                    float wide = read_##TYPE(g + lane), before = m[lane];                                              \
                    packed[stream][lane] |= vote_of(hyper[0] * before + hyper[1] * wide, zero[lane]) << row;           \
                    if (MOVES) m[lane] = hyper[2] * before + hyper[3] * wide;                                          \
                }                                                                                                      \
            }                                                                                                          \
        for (int stream = 0; stream < streams; stream++)                                                               \
            for (int lane = 0; lane < LANES; lane++)                                                                   \
                words[(first + stream * apart) * LANES + lane] = (int32_t)packed[stream][lane];                        \
    }                                                                                                                  \
                                                                                                                       \
    void NAME(const TYPE *const *gradients, float *const *momenta, const float *const *hypers,                         \
              const uint8_t *zero_votes, int32_t *words, const int64_t *begins, const int64_t *blocks, int segments,   \
              int threads) {                                                                                           \
        uint32_t zero[LANES];                                                                                          \
        for (int lane = 0; lane < LANES; lane++) zero[lane] = zero_votes[lane];                                        \
        for (int s = 0; s < segments; s++) {                                                                           \
            int64_t apart = blocks[s] / STREAMS;                                                                       \
            int32_t *own = words + begins[s] * LANES;                                                                  \
            PARALLEL                                                                                                   \
            for (int64_t block = 0; block < apart; block++)                                                            \
                NAME##_blocks(gradients[s], momenta[s], hypers[s], zero, own, block, apart, STREAMS);                  \
            for (int64_t block = STREAMS * apart; block < blocks[s]; block++)                                          \
                NAME##_blocks(gradients[s], momenta[s], hypers[s], zero, own, block, 0, 1);                            \
        }                                                                                                              \
    }

VOTE(float, vote_float, 1)
VOTE(bfloat16, vote_bfloat16, 1)
VOTE(float, peek_float, 0)
VOTE(bfloat16, peek_bfloat16, 0)

static void sign_segment(const float *direction, const uint8_t *zero_votes, int32_t *words, int64_t blocks,
                         int threads) {
    PARALLEL
    for (int64_t block = 0; block < blocks; block++) {
        uint32_t packed[LANES] = {0};
        for (int row = 0; row < LANES; row++) {
            const float *d = direction + block * BLOCK + row * LANES;
            prefetch(d + BLOCK, LANES * sizeof *d);
            for (int lane = 0; lane < LANES; lane++) packed[lane] |= vote_of(d[lane], zero_votes[lane]) << row;
        }
        for (int lane = 0; lane < LANES; lane++) words[block * LANES + lane] = (int32_t)packed[lane];
    }
}

void sign_float(const float *const *directions, const uint8_t *zero_votes, int32_t *words, const int64_t *begins,
                const int64_t *blocks, int segments, int threads) {
    for (int s = 0; s < segments; s++)
        sign_segment(directions[s], zero_votes, words + begins[s] * LANES, blocks[s], threads);
}

#define MOVE(TYPE)                                                                                                     \
    void move_##TYPE(const TYPE *gradient, float *momentum, const float *hyper, int64_t elements, int threads) {       \
        PARALLEL                                                                                                       \
        for (int64_t i = 0; i < elements; i++)                                                                         \
            momentum[i] = hyper[2] * momentum[i] + hyper[3] * read_##TYPE(gradient + i);                               \
    }

MOVE(float)
MOVE(bfloat16)

static inline uint32_t bit_of(const int32_t *plane, int64_t block, int row, int lane) {
    return (uint32_t)plane[block * LANES + lane] >> row & 1;
}

/* What an update works on at a time of one stream. */
#define ROWS 8
#define STRETCH (ROWS * LANES)

static inline void read_levels(int *levels, const int32_t *const *planes, int count, int64_t block, int first_row) {
    for (int row = 0; row < ROWS; row++)
        for (int lane = 0; lane < LANES; lane++)
            levels[row * LANES + lane] = bit_of(planes[0], block, first_row + row, lane);
    for (int p = 1; p < count; p++)
        for (int row = 0; row < ROWS; row++)
            for (int lane = 0; lane < LANES; lane++)
                levels[row * LANES + lane] |= bit_of(planes[p], block, first_row + row, lane) << p;
}

/* D = (2 level - highest) / highest, exactly so: of some rows of a block. */
static inline void decide(float *decided, int highest, const int32_t *const *planes, int count, int64_t block,
                          int first_row) {
    if (count == 1 && highest == 1) {
        for (int row = 0; row < ROWS; row++)
            for (int lane = 0; lane < LANES; lane++)
                decided[row * LANES + lane] = (float)(2 * (int)bit_of(planes[0], block, first_row + row, lane) - 1);
        return;
    }
    if (count == 2 && highest == 2) {
        for (int row = 0; row < ROWS; row++)
            for (int lane = 0; lane < LANES; lane++)
                decided[row * LANES + lane] = (float)((int)bit_of(planes[0], block, first_row + row, lane) - 1 +
                                                      2 * (int)bit_of(planes[1], block, first_row + row, lane));
        return;
    }
    int levels[STRETCH];
    read_levels(levels, planes, count, block, first_row);
    if ((highest & (highest - 1)) == 0) {
        float inverse = 1.0f / (float)highest;
        for (int i = 0; i < STRETCH; i++) decided[i] = (float)(2 * levels[i] - highest) * inverse;
    } else {
        for (int i = 0; i < STRETCH; i++) decided[i] = (float)(2 * levels[i] - highest) / (float)highest;
    }
}

/* `scale` has `scales` elements, of `sizes`: none, one for all, or one for each. */
#define APPLY(TYPE)                                                                                                    \
    static inline void apply_##TYPE##_blocks(TYPE *restrict parameter, const float *restrict hyper, uint32_t seed,     \
                                             const float *scale, int64_t scales, int highest,                          \
                                             const int32_t *const *planes, int count, int64_t first, int64_t apart,    \
                                             int streams) {                                                            \
        for (int row = 0; row < LANES; row += ROWS)                                                                    \
            for (int stream = 0; stream < streams; stream++) {                                                         \
                int64_t block = first + stream * apart, start = block * BLOCK + row * LANES;                           \
                float decided[STRETCH];                                                                                \
                TYPE *x = parameter + start;                                                                           \
                prefetch(x + BLOCK, STRETCH * sizeof *x);                                                              \
                decide(decided, highest, planes, count, block, row);                                                   \
                const float *own = scales > 1 ? scale + start : scale;                                                 \
                if (scales > 1)                                                                                        \
                    for (int i = 0; i < STRETCH; i++) decided[i] *= own[i];                                            \
                else if (scales == 1)                                                                                  \
                    for (int i = 0; i < STRETCH; i++) decided[i] *= own[0];                                            \
                for (int i = 0; i < STRETCH; i++) {                                                                    \
                    float before = read_##TYPE(x + i);                                                                 \
                    float after = before - hyper[4] * (decided[i] + hyper[5] * before);                                \
                    write_##TYPE(x + i, after, (uint32_t)(start + i), seed);                                           \
                }                                                                                                      \
            }                                                                                                          \
    }                                                                                                                  \
                                                                                                                       \
    void apply_##TYPE(TYPE *const *parameters, const float *const *hypers, const uint32_t *const *seeds,               \
                      const float *const *scales, const int64_t *sizes, int highest, const int32_t *const *planes,     \
                      int count, const int64_t *begins, const int64_t *blocks, int segments, int threads) {            \
        for (int s = 0; s < segments; s++) {                                                                           \
            int64_t apart = blocks[s] / STREAMS;                                                                       \
            const int32_t *own[MOST_PLANES];                                                                           \
            for (int p = 0; p < count; p++) own[p] = planes[p] + begins[s] * LANES;                                    \
            PARALLEL                                                                                                   \
            for (int64_t block = 0; block < apart; block++)                                                            \
                apply_##TYPE##_blocks(parameters[s], hypers[s], *seeds[s], scales[s], sizes[s], highest, own, count,   \
                                      block, apart, STREAMS);                                                          \
            for (int64_t block = STREAMS * apart; block < blocks[s]; block++)                                          \
                apply_##TYPE##_blocks(parameters[s], hypers[s], *seeds[s], scales[s], sizes[s], highest, own, count,   \
                                      block, 0, 1);                                                                    \
        }                                                                                                              \
    }

APPLY(float)
APPLY(bfloat16)

#define STEP(TYPE)                                                                                                     \
    void step_##TYPE(TYPE *parameter, const TYPE *gradient, float *momentum, const float *hyper, const uint32_t *seed, \
                     const float *scale, int64_t elements, int threads) {                                              \
        float factor = scale ? *scale : 1.0f;                                                                          \
        PARALLEL                                                                                                       \
        for (int64_t i = 0; i < elements; i++) {                                                                       \
            float wide = read_##TYPE(gradient + i), before = momentum[i], x = read_##TYPE(parameter + i);              \
            float direction = hyper[0] * before + hyper[1] * wide;                                                     \
            float decided = (float)((direction > 0) - (direction < 0)) * factor;                                       \
            momentum[i] = hyper[2] * before + hyper[3] * wide;                                                         \
            write_##TYPE(parameter + i, x - hyper[4] * (decided + hyper[5] * x), (uint32_t)i, *seed);                  \
        }                                                                                                              \
    }

STEP(float)
STEP(bfloat16)

/* As dither.py: the vote of one value. */
static inline uint32_t dithered(float value, uint32_t element, uint32_t seed, float width, uint32_t turn) {
    float noise = (float)(int32_t)scatter(element ^ seed) * 0x1p-31f * width;
    uint32_t zero = value == 0;
    return (zero & (element + turn)) | ((noise + value > 0) & (zero ^ 1));
}

static inline int64_t smaller(int64_t one, int64_t other) { return one < other ? one : other; }
static inline int64_t larger(int64_t one, int64_t other) { return one < other ? other : one; }

/* Of parts of a bucket, one after the other: what is in whole blocks, and what shares its block with a neighbour. */
#define DITHER(TYPE)                                                                                                   \
    static inline void vote_alone_##TYPE(const TYPE *values, int64_t from, int64_t until, int64_t begin,               \
                                         uint32_t seed, float width, uint32_t turn, int32_t *words) {                  \
        for (int64_t i = from; i < until; i++)                                                                         \
            words[i / BLOCK * LANES + i % LANES] |= (int32_t)(                                                         \
                dithered(read_##TYPE(values + i), (uint32_t)(i - begin), seed, width, turn) << i % BLOCK / LANES);     \
    }                                                                                                                  \
                                                                                                                       \
    /* `words` are zeros before. */                                                                                    \
    void dither_##TYPE(const TYPE *values, const int64_t *sizes, const uint32_t *seeds, const float *widths,           \
                       int parts, uint32_t turn, int32_t *words, int threads) {                                        \
        int64_t begin = 0;                                                                                             \
        for (int p = 0; p < parts; p++) {                                                                              \
            int64_t end = begin + sizes[p], first = (begin + BLOCK - 1) / BLOCK, last = end / BLOCK;                   \
            int64_t head = smaller(end, first * BLOCK), tail = larger(head, last * BLOCK);                             \
            vote_alone_##TYPE(values, begin, head, begin, seeds[p], widths[p], turn, words);                           \
            PARALLEL                                                                                                   \
            for (int64_t block = first; block < last; block++) {                                                       \
                uint32_t packed[LANES] = {0};                                                                          \
                for (int row = 0; row < LANES; row++) {                                                                \
                    const TYPE *v = values + block * BLOCK + row * LANES;                                              \
                    uint32_t element = (uint32_t)(block * BLOCK + row * LANES - begin);                                \
                    prefetch(v + BLOCK, LANES * sizeof *v);                                                            \
                    for (int lane = 0; lane < LANES; lane++)                                                           \
                        packed[lane] |= dithered(read_##TYPE(v + lane), element + lane, seeds[p], widths[p], turn)     \
                                        << row;                                                                        \
                }                                                                                                      \
                for (int lane = 0; lane < LANES; lane++) words[block * LANES + lane] = (int32_t)packed[lane];          \
            }                                                                                                          \
            vote_alone_##TYPE(values, tail, end, begin, seeds[p], widths[p], turn, words);                             \
            begin = end;                                                                                               \
        }                                                                                                              \
        for (int64_t i = begin; i % BLOCK; i++)                                                                        \
            words[i / BLOCK * LANES + i % LANES] |= (int32_t)((((uint32_t)(i - begin) + turn) & 1) << i % BLOCK / LANES);\
    }

DITHER(float)
DITHER(bfloat16)

static inline void round_float(float *place, float value) { *place = value; }
static inline void round_bfloat16(bfloat16 *place, float value) {
    uint32_t bits = to_bits(value);
    *place = value != value ? 0x7fc0 : (bfloat16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#define SETTLE(TYPE)                                                                                                   \
    static inline void settle_alone_##TYPE(TYPE *values, int64_t from, int64_t until, float scale, int highest,        \
                                           const int32_t *const *planes, int count) {                                  \
        for (int64_t i = from; i < until; i++) {                                                                       \
            int level = 0;                                                                                             \
            for (int p = 0; p < count; p++)                                                                            \
                level |= (int)bit_of(planes[p], i / BLOCK, (int)(i % BLOCK / LANES), (int)(i % LANES)) << p;           \
            round_##TYPE(values + i, (float)(2 * level - highest) / (float)highest * scale);                           \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    void settle_##TYPE(TYPE *values, const int64_t *sizes, const float *scales, int parts, int highest,                \
                       const int32_t *const *planes, int count, int threads) {                                         \
        int64_t begin = 0;                                                                                             \
        for (int p = 0; p < parts; p++) {                                                                              \
            int64_t end = begin + sizes[p], first = (begin + BLOCK - 1) / BLOCK, last = end / BLOCK;                   \
            int64_t head = smaller(end, first * BLOCK), tail = larger(head, last * BLOCK);                             \
            settle_alone_##TYPE(values, begin, head, scales[p], highest, planes, count);                               \
            PARALLEL                                                                                                   \
            for (int64_t block = first; block < last; block++)                                                         \
                for (int row = 0; row < LANES; row += ROWS) {                                                          \
                    float decided[STRETCH];                                                                            \
                    TYPE *v = values + block * BLOCK + row * LANES;                                                    \
                    decide(decided, highest, planes, count, block, row);                                               \
                    for (int i = 0; i < STRETCH; i++) round_##TYPE(v + i, decided[i] * scales[p]);                     \
                }                                                                                                      \
            settle_alone_##TYPE(values, tail, end, scales[p], highest, planes, count);                                 \
            begin = end;                                                                                               \
        }                                                                                                              \
    }

SETTLE(float)
SETTLE(bfloat16)

#define FIND_BAD(BITS)                                                                                                 \
    static int has_bad_##BITS(const uint##BITS##_t *values, int64_t elements, uint##BITS##_t exponent, int threads) {  \
        int64_t apart = elements / (STREAMS * BLOCK);                                                                  \
        int found = 0;                                                                                                 \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1) reduction(| : found)")        \
        for (int64_t block = 0; block < apart; block++) {                                                              \
            uint##BITS##_t bad[LANES] = {0};                                                                           \
            for (int row = 0; row < LANES; row++)                                                                      \
                for (int stream = 0; stream < STREAMS; stream++) {                                                     \
                    const uint##BITS##_t *v = values + (block + stream * apart) * BLOCK + row * LANES;                 \
                    prefetch(v + BLOCK, LANES * sizeof *v);                                                            \
                    for (int lane = 0; lane < LANES; lane++) bad[lane] |= (v[lane] & exponent) == exponent;            \
                }                                                                                                      \
            for (int lane = 0; lane < LANES; lane++) found |= bad[lane];                                               \
        }                                                                                                              \
        for (int64_t i = STREAMS * apart * BLOCK; i < elements; i++) found |= (values[i] & exponent) == exponent;      \
        return found;                                                                                                  \
    }                                                                                                                  \
                                                                                                                       \
    /* The first tensor with a value that has all bits of `exponent`, so an Inf or a NaN; -1 if there is none. Backwards,\
       so that what a vote reads first is read last here, and still in the cache. */                                   \
    int find_bad_##BITS(const uint##BITS##_t *const *tensors, const int64_t *sizes, int count,                         \
                        uint##BITS##_t exponent, int threads) {                                                        \
        int first = -1;                                                                                                \
        for (int t = count - 1; t >= 0; t--)                                                                           \
            if (has_bad_##BITS(tensors[t], sizes[t], exponent, threads)) first = t;                                    \
        return first;                                                                                                  \
    }

FIND_BAD(16)
FIND_BAD(32)

#define WIDTH 256

/* Adds a vote to bit-sliced counts, of which the first `planes` can change. */
static inline void add_vote(uint32_t counts[][WIDTH], int planes, const int32_t *vote, int words) {
    uint32_t carry[WIDTH];
    for (int i = 0; i < words; i++) carry[i] = (uint32_t)vote[i];
    for (int p = 0; p < planes; p++)
        for (int i = 0; i < words; i++) {
            uint32_t before = counts[p][i];
            counts[p][i] = before ^ carry[i];
            carry[i] &= before;
        }
}

/* Where the count is at least `least`, which is at least 1. */
static inline void reaches(uint32_t *found, uint32_t counts[][WIDTH], int planes, int least, int words) {
    int lowest = __builtin_ctz(least);
    for (int i = 0; i < words; i++) found[i] = counts[lowest][i];
    for (int p = lowest + 1; p < planes; p++) {
        uint32_t set = least >> p & 1 ? 0 : ~0u;
        for (int i = 0; i < words; i++) found[i] = (found[i] & (counts[p][i] | set)) | (counts[p][i] & set);
    }
}

/* Where the count is `value`. */
static inline void equals(uint32_t *found, uint32_t counts[][WIDTH], int planes, int value, int words) {
    for (int i = 0; i < words; i++) found[i] = ~0u;
    for (int p = 0; p < planes; p++) {
        uint32_t inverted = value >> p & 1 ? 0 : ~0u;
        for (int i = 0; i < words; i++) found[i] &= counts[p][i] ^ inverted;
    }
}

static inline int64_t bits_set(const uint32_t *words, int first, int until, int64_t stride) {
    int64_t total = 0;
    for (int64_t i = first; i < until; i += stride) total += __builtin_popcount(words[i]);
    return total;
}

enum { AVERAGE, TIES_ZERO, TIES_ALTERNATE };

/* The planes of a decision, and into `sums` how many votes were unanimous and how many split evenly, in every
   `stride`-th of the first `valid` words. An odd word has bit `parity` where ties alternate, an even one the other. */
void tally(const int32_t *const *votes, int voters, int rule, int parity, int32_t *const *decided, int64_t words,
           int64_t valid, int64_t stride, int64_t *sums, int threads) {
    int planes = 32 - __builtin_clz(voters), even = voters % 2 == 0;
    int64_t unanimous = 0, ties = 0;
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1) reduction(+ : unanimous, ties)")
    for (int64_t start = 0; start < words; start += WIDTH) {
        uint32_t counts[MOST_PLANES][WIDTH], ahead[WIDTH], tied[WIDTH], none[WIDTH], all[WIDTH];
        int here = words - start < WIDTH ? (int)(words - start) : WIDTH;
        for (int p = 0; p < planes; p++)
            for (int i = 0; i < here; i++) counts[p][i] = 0;
        for (int v = 0; v < voters; v++) add_vote(counts, 32 - __builtin_clz(v + 1), votes[v] + start, here);
        equals(tied, counts, planes, voters / 2, here);

        if (rule == AVERAGE) {
            for (int p = 0; p < planes; p++)
                for (int i = 0; i < here; i++) decided[p][start + i] = (int32_t)counts[p][i];
        } else {
            reaches(ahead, counts, planes, voters / 2 + 1, here);
            int32_t *last = decided[even && rule == TIES_ZERO] + start;
            if (even && rule == TIES_ZERO)
                for (int i = 0; i < here; i++) decided[0][start + i] = (int32_t)tied[i];
            else if (even)
                for (int i = 0; i < here; i++) ahead[i] |= tied[i] & -(uint32_t)((i + parity) & 1);
            for (int i = 0; i < here; i++) last[i] = (int32_t)ahead[i];
        }

        int until = valid - start < here ? (int)(valid - start) : here;
        int first = (int)((stride - start % stride) % stride);
        if (first >= until) continue;
        equals(none, counts, planes, 0, here);
        equals(all, counts, planes, voters, here);
        for (int i = 0; i < here; i++) none[i] |= all[i];
        unanimous += bits_set(none, first, until, stride);
        if (even) ties += bits_set(tied, first, until, stride);
    }
    sums[0] = unanimous;
    sums[1] = ties;
}
