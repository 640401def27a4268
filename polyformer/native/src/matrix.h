// Matrices as products read them, and how they are made of what files hold.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "kernels.h"

namespace polyformer {

// Memory that begins at a multiple of 64 bytes.
struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Memory = std::unique_ptr<T[], Free>;

template <class T>
Memory<T> memory_for(int64_t count);

// How the numbers of a tensor are given: the numbers of ggml's formats.
enum Source : int32_t { F32_GIVEN = 0, F16_GIVEN = 1, Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, Q4_K = 12, Q6_K = 14, BF16_GIVEN = 30 };

// A tensor's bytes, and which of its rows are wanted in which order (all, as they are, if `order` is null).
struct Given {
    Source source;
    const uint8_t* data;
    int64_t bytes;
    int64_t rows, columns;
    const int64_t* order;
};

struct Matrix {
    Kind kind = F32;
    int64_t rows = 0, columns = 0, groups = 0, blocks = 0, block_bytes = 0;
    Memory<uint8_t> data;

    const uint8_t* block(int64_t number) const { return data.get() + number * block_bytes; }
    // Write a row's numbers.
    void row(int64_t number, float* out) const;
};

// Check what is given against the shape wanted, and pack it. Where a format's own codes fit the kind, they stay as
// they are; others are rounded anew.
Matrix pack(Kind kind, int64_t rows, int64_t columns, const Given& given);
std::vector<float> plain(int64_t rows, int64_t columns, const Given& given);

}  // namespace polyformer
