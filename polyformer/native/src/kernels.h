// What the runtime asks of a processor: one table of functions for each kind of processor, chosen at run time.
#pragma once

#include <stdint.h>

namespace polyformer {

// How the numbers of a matrix are held. Rows are cut into blocks of 16, columns into groups of 32.
//
//   F32        block: [column][16 rows] floats
//   others     block: [group]{16 half-precision scales, 16 minima if there are any, codes of 16 rows × 32 columns}
//
// Codes stand in the order in which products read them: four neighbouring columns of each of 16 rows, then the next
// four columns. Of 4-bit codes, a byte holds a code of the first 16 columns below and one of the last 16 above.
enum Kind : int32_t { F32, Q8, Q8M, Q4, Q4M, KINDS };

constexpr int64_t BLOCK = 16, GROUP = 32, SCAN = 64;

constexpr bool has_minima(Kind kind) { return kind == Q8M || kind == Q4M; }
constexpr int bits_of(Kind kind) { return kind == Q4 || kind == Q4M ? 4 : 8; }
constexpr int64_t group_bytes(Kind kind) { return 32 + (has_minima(kind) ? 32 : 0) + bits_of(kind) * 64; }

// Rows that go into a product: as they are, or as whole numbers of 8 bits with a scale for each group of 32 and the
// sum of each group.
struct Operand {
    const float* rows;
    int64_t width;
    const int8_t* codes;
    const float* scales;
    const float* sums;
    int64_t groups;
};

// Where the products of a block with some rows go: `live` of its 16 outputs are real.
struct Target {
    const float* bias;
    float* out;
    int64_t width;
    int64_t live;
};

// In what precision keys and values are held.
enum Cell : int32_t { CELL_F32, CELL_F16, CELL_I8, CELLS };

constexpr int64_t bytes_of(Cell cell) { return cell == CELL_F32 ? 4 : cell == CELL_F16 ? 2 : 1; }

// c [rows, panels · 16] = a [rows, depth] · b, whose panels of [depth, 16] stand `apart` numbers from each other.
struct Panels {
    const float* a;
    int64_t a_width, rows;
    const uint8_t* b;
    int64_t b_width, apart, count, depth;
    float* c;
    int64_t c_width;
};

struct Kernels {
    const char* name;
    // One row to whole numbers: n numbers, padded with zeros to `groups` groups.
    void (*quantise)(const float* x, int64_t n, int64_t groups, int8_t* codes, float* scales, float* sums);
    // A block of 16 outputs for the rows first … first + count.
    void (*product[KINDS])(const uint8_t* block, const Operand& x, int64_t first, int64_t count, const Target& target);
    // Products with numbers as a cache holds them.
    void (*panels[CELLS])(const Panels& panels);
    // x[0 … n) to its softmax; n numbers may be read and written up to the next multiple of 8.
    void (*softmax)(float* x, int64_t n);
    void (*norm)(const float* x, float* out, int64_t n, const float* gain, const float* bias, float eps, float offset,
                 bool centred);
    void (*apply)(int32_t function, const float* x, const float* times, float* out, int64_t n);
    // The largest of each SCAN numbers, and of all; no number, if any is none or infinite.
    float (*largest)(const float* x, int64_t n, float* of_each);
    // The sum of e^(x - most).
    double (*exponentials)(const float* x, int64_t n, float most);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__) || defined(__i386__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif
#if defined(__aarch64__) || defined(EMULATED)
extern const Kernels neon_kernels, neon_dot_kernels;
#endif

// The best that this processor can run; with `plain` the portable ones.
const Kernels& kernels_here(bool plain);

}  // namespace polyformer
