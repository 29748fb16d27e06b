/* The passes over parameters of kernels.py for CPUs, each reading and writing its memory once.

   Every operation is rounded as the formulas there stand: no contraction (-ffp-contract=off), no reordering. `hyper` is
   beta1, 1 - beta1, beta2, 1 - beta2, lr, weight_decay. A block is 32 rows of 32 lanes: bit k of word j is row k, lane j. */

#include <stdint.h>

#define LANES 32
#define BLOCK (LANES * LANES)
#define PARALLEL _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")

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

/* As rounding.py: a hash of the element carries into the upper half. */
static inline void write_bfloat16(bfloat16 *place, float value, uint32_t element, uint32_t seed) {
    uint32_t hash = element ^ seed;
    hash = (hash ^ (hash >> 16)) * 0x7feb352du;
    hash = (hash ^ (hash >> 15)) * 0x846ca68bu;
    *place = (bfloat16)((to_bits(value) + ((hash ^ (hash >> 16)) & 0xffff)) >> 16);
}

static inline uint32_t vote_of(float direction, uint8_t zero_vote) {
    return (direction > 0) | ((direction == 0) & zero_vote);
}

#define VOTE(TYPE, NAME, MOVES)                                                                                        \
    void NAME(const TYPE *gradient, float *momentum, const float *hyper, const uint8_t *zero_votes, int32_t *words,    \
              int64_t blocks, int threads) {                                                                           \
        PARALLEL                                                                                                       \
        for (int64_t block = 0; block < blocks; block++) {                                                             \
            uint32_t packed[LANES] = {0};                                                                              \
            for (int row = 0; row < LANES; row++) {                                                                    \
                const TYPE *g = gradient + block * BLOCK + row * LANES;                                                \
                float *m = momentum + block * BLOCK + row * LANES;                                                     \
                for (int lane = 0; lane < LANES; lane++) {                                                             \
                    float wide = read_##TYPE(g + lane), before = m[lane];                                              \
                    packed[lane] |= vote_of(hyper[0] * before + hyper[1] * wide, zero_votes[lane]) << row;             \
                    if (MOVES) m[lane] = hyper[2] * before + hyper[3] * wide;                                          \
                }                                                                                                      \
            }                                                                                                          \
            for (int lane = 0; lane < LANES; lane++) words[block * LANES + lane] = (int32_t)packed[lane];              \
        }                                                                                                              \
    }

VOTE(float, vote_float, 1)
VOTE(bfloat16, vote_bfloat16, 1)
VOTE(float, peek_float, 0)
VOTE(bfloat16, peek_bfloat16, 0)

void sign_float(const float *direction, const uint8_t *zero_votes, int32_t *words, int64_t blocks, int threads) {
    PARALLEL
    for (int64_t block = 0; block < blocks; block++) {
        uint32_t packed[LANES] = {0};
        for (int row = 0; row < LANES; row++)
            for (int lane = 0; lane < LANES; lane++)
                packed[lane] |= vote_of(direction[block * BLOCK + row * LANES + lane], zero_votes[lane]) << row;
        for (int lane = 0; lane < LANES; lane++) words[block * LANES + lane] = (int32_t)packed[lane];
    }
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

static inline void read_levels(int *levels, const int32_t *const *planes, int count, int64_t block) {
    for (int row = 0; row < LANES; row++)
        for (int lane = 0; lane < LANES; lane++) levels[row * LANES + lane] = bit_of(planes[0], block, row, lane);
    for (int p = 1; p < count; p++)
        for (int row = 0; row < LANES; row++)
            for (int lane = 0; lane < LANES; lane++)
                levels[row * LANES + lane] |= bit_of(planes[p], block, row, lane) << p;
}

/* D = (2 level - highest) / highest, exactly so: of a block. */
static inline void decide(float *decided, int highest, const int32_t *const *planes, int count, int64_t block) {
    if (count == 1 && highest == 1) {
        for (int row = 0; row < LANES; row++)
            for (int lane = 0; lane < LANES; lane++)
                decided[row * LANES + lane] = (float)(2 * (int)bit_of(planes[0], block, row, lane) - 1);
        return;
    }
    int levels[BLOCK];
    read_levels(levels, planes, count, block);
    if ((highest & (highest - 1)) == 0) {
        float inverse = 1.0f / (float)highest;
        for (int i = 0; i < BLOCK; i++) decided[i] = (float)(2 * levels[i] - highest) * inverse;
    } else {
        for (int i = 0; i < BLOCK; i++) decided[i] = (float)(2 * levels[i] - highest) / (float)highest;
    }
}

/* `scale` has `scales` elements: none, one for all, or one for each. */
#define APPLY(TYPE)                                                                                                    \
    void apply_##TYPE(TYPE *parameter, const float *hyper, const uint32_t *seed, const float *scale, int64_t scales,   \
                      int highest, const int32_t *const *planes, int count, int64_t blocks, int threads) {             \
        PARALLEL                                                                                                       \
        for (int64_t block = 0; block < blocks; block++) {                                                             \
            float decided[BLOCK];                                                                                      \
            TYPE *x = parameter + block * BLOCK;                                                                       \
            decide(decided, highest, planes, count, block);                                                            \
            const float *own = scales > 1 ? scale + block * BLOCK : scale;                                             \
            if (scales > 1)                                                                                            \
                for (int i = 0; i < BLOCK; i++) decided[i] *= own[i];                                                  \
            else if (scales == 1)                                                                                      \
                for (int i = 0; i < BLOCK; i++) decided[i] *= own[0];                                                  \
            for (int i = 0; i < BLOCK; i++) {                                                                          \
                float before = read_##TYPE(x + i);                                                                     \
                float after = before - hyper[4] * (decided[i] + hyper[5] * before);                                    \
                write_##TYPE(x + i, after, (uint32_t)(block * BLOCK + i), *seed);                                      \
            }                                                                                                          \
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
