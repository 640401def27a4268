#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include "refused.h"
#include "vectors.h"

namespace polyformer {

constexpr int64_t LARGE_PAGE = (int64_t)1 << 21;

template <class T>
Memory<T> memory_for(int64_t count) {
    const int64_t bytes = (product_of(count, (int64_t)sizeof(T)) + 127) / 64 * 64;
    // Large pieces stand on large pages where the system has them: fewer look-ups of addresses as they are read.
    const bool large = bytes >= 2 * LARGE_PAGE;
    void* found = nullptr;
    if (posix_memalign(&found, large ? (size_t)LARGE_PAGE : 64, (size_t)bytes)) refuse("there is no memory for %lld bytes", (long long)bytes);
#ifdef MADV_HUGEPAGE
    if (large) madvise(found, (size_t)bytes, MADV_HUGEPAGE);
#endif
    std::memset(found, 0, (size_t)bytes);
    return Memory<T>((T*)found);
}
template Memory<uint8_t> memory_for(int64_t);
template Memory<int8_t> memory_for(int64_t);
template Memory<float> memory_for(int64_t);

namespace {

// Bytes and numbers of a piece of each format, and the kind that holds its codes as they are.
struct Format {
    int64_t numbers, bytes;
    Kind kind;
};

Format format_of(Source source) {
    switch (source) {
        case F32_GIVEN: return {1, 4, KINDS};
        case F16_GIVEN:
        case BF16_GIVEN: return {1, 2, KINDS};
        case Q4_0: return {32, 18, Q4};
        case Q4_1: return {32, 20, Q4M};
        case Q8_0: return {32, 34, Q8};
        case Q4_K: return {256, 144, Q4M};
        case Q6_K: return {256, 210, KINDS};
    }
    refuse("tensors of the format %d can't be packed", (int)source);
}

float half_at(const uint8_t* from) {
    uint16_t half;
    memcpy(&half, from, 2);
    return widened(half);
}

// 32 numbers as codes: number = scale · code + low.
struct Coded {
    float scale = 0, low = 0;
    int32_t codes[32] = {0};
};

// Q4_K holds a scale and a minimum of 6 bits for each of 8 groups, in 12 bytes.
void scales_of(const uint8_t* packed, int64_t group, int* scale, int* low) {
    if (group < 4) {
        *scale = packed[group] & 63;
        *low = packed[group + 4] & 63;
    } else {
        *scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6 << 4);
        *low = (packed[group + 4] >> 4) | (packed[group] >> 6 << 4);
    }
}

Coded coded_group(Source source, const uint8_t* row, int64_t group) {
    Coded found;
    if (source == Q4_0 || source == Q4_1) {
        const uint8_t* piece = row + group * (source == Q4_0 ? 18 : 20);
        const uint8_t* codes = piece + (source == Q4_0 ? 2 : 4);
        found.scale = half_at(piece);
        found.low = source == Q4_0 ? -8 * found.scale : half_at(piece + 2);
        for (int i = 0; i < 16; ++i) found.codes[i] = codes[i] & 15, found.codes[i + 16] = codes[i] >> 4;
    } else if (source == Q8_0) {
        const uint8_t* piece = row + group * 34;
        found.scale = half_at(piece);
        for (int i = 0; i < 32; ++i) found.codes[i] = (int8_t)piece[2 + i];
    } else {
        const uint8_t* piece = row + group / 8 * 144;
        int scale, low;
        scales_of(piece + 4, group % 8, &scale, &low);
        found.scale = half_at(piece) * (float)scale;
        found.low = -half_at(piece + 2) * (float)low;
        const uint8_t* codes = piece + 16 + group % 8 / 2 * 32;
        for (int i = 0; i < 32; ++i) found.codes[i] = group % 2 ? codes[i] >> 4 : codes[i] & 15;
    }
    return found;
}

void q6_k_group(const uint8_t* row, int64_t group, float* out) {
    const uint8_t* piece = row + group / 8 * 210;
    const int64_t half = group % 8 / 4, quarter = group % 4;  // 128 numbers, and 32 of them
    const uint8_t *low = piece + 64 * half + quarter % 2 * 32, *high = piece + 128 + 32 * half;
    for (int i = 0; i < 32; ++i) {
        const int code = (quarter < 2 ? low[i] & 15 : low[i] >> 4) | (high[i] >> 2 * quarter & 3) << 4;
        const int scale = (int8_t)piece[192 + group % 8 * 2 + i / 16];
        out[i] = half_at(piece + 208) * (float)scale * (float)(code - 32);
    }
}

// The numbers first … first + 32 of a row; behind its end there are zeros.
void numbers_of(const Given& given, const uint8_t* row, int64_t group, float* out) {
    const int64_t first = group * GROUP, count = std::min(GROUP, given.columns - first);
    if (given.source == Q6_K) return q6_k_group(row, group, out);
    if (format_of(given.source).numbers > 1) {
        const Coded coded = coded_group(given.source, row, group);
        for (int i = 0; i < 32; ++i) out[i] = coded.scale * (float)coded.codes[i] + coded.low;
        return;
    }
    for (int64_t i = 0; i < GROUP; ++i) {
        out[i] = 0;
        if (i >= count) continue;
        if (given.source == F32_GIVEN) {
            memcpy(out + i, row + 4 * (first + i), 4);
        } else if (given.source == F16_GIVEN) {
            out[i] = half_at(row + 2 * (first + i));
        } else {
            uint16_t upper;
            memcpy(&upper, row + 2 * (first + i), 2);
            const uint32_t bits = (uint32_t)upper << 16;
            memcpy(out + i, &bits, 4);
        }
    }
}

float nearest_half(float x) { return widened(narrowed(x)); }

// Round 32 numbers; with minima from the least on, else to both sides of zero.
Coded rounded(Kind kind, const float* x) {
    Coded found;
    const auto [least, most] = std::minmax_element(x, x + 32);
    const int levels = bits_of(kind) == 4 ? 15 : 255;
    if (has_minima(kind)) {
        found.low = nearest_half(*least);
        found.scale = nearest_half((*most - found.low) / (float)levels);
        if (kind == Q8M) found.low = nearest_half(found.low + 128 * found.scale);  // codes are signed
    } else if (kind == Q8) {
        found.scale = nearest_half(std::max(-*least, *most) / 127);
    } else {
        found.scale = nearest_half((-*least > *most ? *least : *most) / -8);
        found.low = -8 * found.scale;
    }
    const float inverse = found.scale != 0 ? 1 / found.scale : 0;
    const int lowest = bits_of(kind) == 4 ? 0 : kind == Q8 ? -127 : -128, highest = bits_of(kind) == 4 ? 15 : 127;
    for (int i = 0; i < 32; ++i) {
        const float code = std::nearbyint((x[i] - found.low) * inverse);
        found.codes[i] = code >= (float)lowest ? (int32_t)std::min(code, (float)highest) : lowest;  // what is no number too
    }
    return found;
}

int64_t row_bytes(const Given& given) {
    const Format format = format_of(given.source);
    if (given.columns % format.numbers) refuse("rows of %lld numbers are no whole pieces", (long long)given.columns);
    return given.columns / format.numbers * format.bytes;
}

void check(int64_t rows, int64_t columns, const Given& given) {
    if (rows < 1 || columns < 1 || given.columns != columns) refuse("a tensor has another shape than the program says");
    if (!given.order && given.rows != rows) refuse("a tensor has another number of rows than the program says");
    product_of(given.rows, columns, 4);
    if (product_of(given.rows, row_bytes(given)) != given.bytes) refuse("a tensor's bytes don't fit its shape");
    for (int64_t i = 0; given.order && i < rows; ++i)
        if (given.order[i] < 0 || given.order[i] >= given.rows) refuse("a tensor is asked for a row that it hasn't");
}

const uint8_t* source_row(const Given& given, int64_t row) {
    return given.data + (given.order ? given.order[row] : row) * row_bytes(given);
}

// Where the code of a block's row and a group's column stands.
uint8_t* place_of(uint8_t* codes, int bits, int64_t row, int64_t column) {
    const int64_t chunk = bits == 4 ? column % 16 / 4 : column / 4;
    return codes + chunk * 64 + row * 4 + column % 4;
}

void place(Matrix& matrix, int64_t row, int64_t group, const Coded& coded) {
    uint8_t* from = matrix.data.get() + row / BLOCK * matrix.block_bytes + group * group_bytes(matrix.kind);
    const int64_t inner = row % BLOCK;
    const uint16_t scale = narrowed(coded.scale), low = narrowed(coded.low);
    memcpy(from + 2 * inner, &scale, 2);
    if (has_minima(matrix.kind)) memcpy(from + 32 + 2 * inner, &low, 2);
    uint8_t* codes = from + (has_minima(matrix.kind) ? 64 : 32);
    const int bits = bits_of(matrix.kind);
    for (int64_t i = 0; i < GROUP; ++i) {
        uint8_t* at = place_of(codes, bits, inner, i);
        if (bits == 8) *at = (uint8_t)coded.codes[i];
        if (bits == 4) *at = (uint8_t)(*at | (i < 16 ? coded.codes[i] : coded.codes[i] << 4));
    }
}

}  // namespace

Matrix pack(Kind kind, int64_t rows, int64_t columns, const Given& given) {
    if (kind < 0 || kind >= KINDS) refuse("there is no kind %d of matrix", (int)kind);
    check(rows, columns, given);
    Matrix found;
    found.kind = kind, found.rows = rows, found.columns = columns;
    found.groups = (columns + GROUP - 1) / GROUP, found.blocks = (rows + BLOCK - 1) / BLOCK;
    found.block_bytes = kind == F32 ? product_of(columns, BLOCK, 4) : product_of(found.groups, group_bytes(kind));
    found.data = memory_for<uint8_t>(product_of(found.blocks, found.block_bytes));
    const bool as_it_is = format_of(given.source).kind == kind;
    for (int64_t row = 0; row < rows; ++row) {
        const uint8_t* from = source_row(given, row);
        for (int64_t group = 0; group < found.groups; ++group) {
            if (as_it_is) {
                place(found, row, group, coded_group(given.source, from, group));
                continue;
            }
            float numbers[32];
            numbers_of(given, from, group, numbers);
            if (kind != F32) {
                place(found, row, group, rounded(kind, numbers));
                continue;
            }
            float* block = (float*)(found.data.get() + row / BLOCK * found.block_bytes);
            for (int64_t i = 0; i < GROUP && group * GROUP + i < columns; ++i)
                block[(group * GROUP + i) * BLOCK + row % BLOCK] = numbers[i];
        }
    }
    return found;
}

std::vector<float> plain(int64_t rows, int64_t columns, const Given& given) {
    check(rows, columns, given);
    std::vector<float> found((size_t)(product_of(rows, columns) + 2 * BLOCK));  // blocks may be read beyond the end
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t group = 0; group < (columns + GROUP - 1) / GROUP; ++group) {
            float numbers[32];
            numbers_of(given, source_row(given, row), group, numbers);
            const int64_t count = std::min(GROUP, columns - group * GROUP);
            std::copy(numbers, numbers + count, found.begin() + row * columns + group * GROUP);
        }
    }
    return found;
}

void Matrix::row(int64_t number, float* out) const {
    const uint8_t* from = block(number / BLOCK);
    const int64_t inner = number % BLOCK;
    if (kind == F32) {
        for (int64_t i = 0; i < columns; ++i) out[i] = ((const float*)from)[i * BLOCK + inner];
        return;
    }
    const int bits = bits_of(kind);
    for (int64_t group = 0; group < groups; ++group, from += group_bytes(kind)) {
        const float scale = half_at(from + 2 * inner);
        const float low = has_minima(kind) ? half_at(from + 32 + 2 * inner) : bits == 4 ? -8 * scale : 0;
        uint8_t* codes = const_cast<uint8_t*>(from) + (has_minima(kind) ? 64 : 32);
        for (int64_t i = 0; i < GROUP && group * GROUP + i < columns; ++i) {
            const uint8_t code = *place_of(codes, bits, inner, i);
            const int value = bits == 8 ? (int8_t)code : i < 16 ? code & 15 : code >> 4;
            out[group * GROUP + i] = scale * (float)value + low;
        }
    }
}

}  // namespace polyformer
