// A program as it comes from Python: numbers in a row, of which not one is believed before it is checked.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.h"

namespace polyformer {

enum Code : int32_t {
    TAKE_TOKENS, ADD_PLACES, NORM_ROWS, MULTIPLY, ROTATE, REMEMBER, LOOK,
    APPLY, GATE, ADD_ROWS, SCALE_ROWS, CLIP_ROWS, CAP_ROWS, PICK_ROWS, CHOOSE_EXPERTS, MULTIPLY_CHOSEN,
    BLEND_CHOSEN, DAMP_ROWS, CODES
};

enum Bias : int32_t { NO_BIAS, SLOPES, ROUNDED_SLOPES, BUCKETS };

struct CacheShape {
    int64_t groups, width;
    bool memory;  // of the text that was read, not of the one that is written
    int64_t window = 0;  // how many keys, the row's own included, are looked at most; 0 for all
};

struct Product {
    int32_t out, matrix, bias;
};

// One instruction; which fields have a meaning its code says (see `program.py`).
struct Instruction {
    Code code;
    int32_t out = -1, x = -1, y = -1;
    int32_t weight = -1, bias = -1;         // of norms: gain and bias; else the table
    int32_t number = 0;                     // cache, waves or choice
    int64_t width = 0, heads = 0, window = 0, offset = 0, capacity = 0;
    int32_t choice = 0;                     // function, kind of norm, layout, or rule
    float scale = 1, cap = 0, eps = 0;
    int32_t bias_kind = NO_BIAS;
    int64_t buckets = 0, distance = 0;
    bool two_sided = false;
    std::vector<float> slopes;
    std::vector<Product> products;          // of chosen experts: of all for the first output, then for the next
};

struct Waves {
    std::vector<float> rates;
    float strength;
};

// A choice that is made for each row: `chosen` of so many experts.
struct ExpertChoice {
    int64_t experts, chosen;
};

struct WeightShape {
    int64_t rows, columns;  // a vector has one row
    bool packed;
};

struct Program {
    int64_t vocabulary = 0, length = 0;
    std::vector<int64_t> registers;
    std::vector<CacheShape> caches;
    std::vector<Waves> waves;
    std::vector<ExpertChoice> choices;
    std::vector<WeightShape> weights;
    std::vector<Instruction> write, read;
    int32_t scores = -1;
    int64_t tokens_written = 0, tokens_read = 0;  // how many tokens the tables of either part know
};

Program decode(const int64_t* words, int64_t count);

}  // namespace polyformer
