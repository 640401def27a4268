// Attention over what slots hold. Its work is cut into pieces: a few rows of one sequence that stand side by side, and
// the heads that share a head of keys, so that each key is read once for all of them.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "refused.h"
#include "run.h"
#include "vectors.h"

namespace polyformer {

namespace {

// T5's buckets (Raffel et al. 2020, section 2.1): exact near by, then logarithmic.
int64_t bucket_of(const Instruction& one, int64_t apart) {
    const int64_t count = one.two_sided ? one.buckets / 2 : one.buckets, fine = count / 2;
    const int64_t behind = one.two_sided && apart > 0 ? count : 0;
    const int64_t away = one.two_sided ? std::abs(apart) : std::max<int64_t>(-apart, 0);
    if (away < fine) return behind + away;
    const float share = std::log((float)away / (float)fine) / (float)std::log((double)one.distance / (double)fine);
    return behind + std::min(fine + (int64_t)(share * (float)(count - fine)), count - 1);
}

float rounded_to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    std::memcpy(&x, &bits, 4);
    return x;
}

}  // namespace

void State::pieces_of(const Instruction& one, std::vector<Piece>& into) const {
    into.clear();
    const int64_t groups = model_.program.caches[(size_t)one.number].groups, sharing = one.heads / groups;
    int64_t heads = std::min(sharing, PIECE);
    while (heads > 1 && tokens_.count * groups * ((sharing + heads - 1) / heads) < settings_.threads) heads = (heads + 1) / 2;
    const int64_t rows = std::max<int64_t>(1, PIECE / heads);
    const auto together = [&](int64_t row, int64_t other) {
        if (one.choice == 1) return &store_of(one, row) == &store_of(one, other);  // hypotheses of one text, too
        return tokens_.slots[other] == tokens_.slots[row] && tokens_.places[other] == tokens_.places[row] + other - row;
    };
    for (int64_t row = 0, count; row < tokens_.count; row += count) {
        count = 1;
        while (count < rows && row + count < tokens_.count && together(row, row + count)) ++count;
        for (int64_t group = 0; group < groups; ++group)
            for (int64_t head = 0; head < sharing; head += heads)
                into.push_back({row, count, group, group * sharing + head, std::min(heads, sharing - head)});
    }
    std::reverse(into.begin(), into.end());  // the longest first
}

int64_t State::keys_of(const Instruction& one, int64_t row) const {
    return one.choice == 0 ? tokens_.places[row] + 1 : store_of(one, row).length;
}

void State::look(const Instruction& one, const Piece& piece, int thread) {
    const int64_t width = settings_.room + PANEL, end = keys_of(one, piece.row + piece.rows - 1);
    const auto first_of = [&](int64_t keys) { return one.window ? std::max<int64_t>(0, keys - one.window) : 0; };
    const int64_t first = first_of(keys_of(one, piece.row)) / PANEL * PANEL;
    float* scores = scratch_[(size_t)thread].get();
    score(one, piece, scores, width, first, end, thread);
    for (int64_t i = 0; i < piece.rows * piece.heads; ++i) {
        const int64_t row = piece.row + i / piece.heads, keys = keys_of(one, row), begin = first_of(keys);
        float* own = scores + i * width;
        if (one.cap > 0)
            for (int64_t k = 0; k < keys - first; ++k) own[k] = one.cap * std::tanh(own[k] / one.cap);
        if (one.bias_kind != NO_BIAS) add_bias(one, own, piece.head + i % piece.heads, tokens_.places[row], first, keys - first);
        std::fill(own, own + (begin - first), -3e38f);
        kernels_.softmax(own, keys - first);
        std::fill(own, own + (begin - first), 0.0f);
        std::fill(own + (keys - first), own + up_to(end - first, PANEL), 0.0f);
    }
    mix(one, piece, scores, width, first, end, thread);
}

// Scores [rows · heads, width] of the keys first … end.
void State::score(const Instruction& one, const Piece& piece, float* scores, int64_t width, int64_t first, int64_t end,
                  int thread) {
    const CacheShape& shape = model_.program.caches[(size_t)one.number];
    const Place& place = place_of(one);
    const Store& store = store_of(one, piece.row);
    const int64_t rows = piece.rows * piece.heads, room = place.room, gone = store.first[(size_t)one.number];
    float* queries = scratch_[(size_t)thread].get() + PIECE * width;
    for (int64_t i = 0; i < rows; ++i) {
        const float* from = row_of(one.x, piece.row + i / piece.heads) + (piece.head + i % piece.heads) * shape.width;
        for (int64_t k = 0; k < shape.width; ++k) queries[i * shape.width + k] = from[k] * one.scale;
    }
    const int64_t at = place.keys + (piece.group * room + first - gone) * shape.width;
    kernels_.panels[settings_.cell](Panels{queries, shape.width, rows, store.cells.get() + at * bytes_of(settings_.cell), PANEL,
                                           PANEL * shape.width, (end - first + PANEL - 1) / PANEL, shape.width, scores, width});
    if (settings_.cell != CELL_I8) return;
    const float* scales = store.scales.get() + place.key_scales + piece.group * room + first - gone;
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < end - first; ++k) scores[i * width + k] *= scales[k];
}

// The values mixed by weights [rows · heads, width], into each row's heads.
void State::mix(const Instruction& one, const Piece& piece, float* scores, int64_t width, int64_t first, int64_t end,
                int thread) {
    const CacheShape& shape = model_.program.caches[(size_t)one.number];
    const Place& place = place_of(one);
    const Store& store = store_of(one, piece.row);
    const int64_t rows = piece.rows * piece.heads, room = place.room, padded = up_to(shape.width, PANEL);
    const int64_t gone = store.first[(size_t)one.number];
    float* mixed = scratch_[(size_t)thread].get() + PIECE * width;
    if (settings_.cell == CELL_I8) {
        const float* scales = store.scales.get() + place.value_scales + piece.group * room + first - gone;
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t k = 0; k < end - first; ++k) scores[i * width + k] *= scales[k];
    }
    const int64_t at = place.values + (piece.group * room + first - gone) * padded;
    kernels_.panels[settings_.cell](Panels{scores, width, rows, store.cells.get() + at * bytes_of(settings_.cell), padded, PANEL,
                                           padded / PANEL, end - first, mixed, padded});
    for (int64_t i = 0; i < rows; ++i) {
        float* out = row_of(one.out, piece.row + i / piece.heads) + (piece.head + i % piece.heads) * shape.width;
        std::memcpy(out, mixed + i * padded, (size_t)shape.width * sizeof(float));
    }
}

void State::add_bias(const Instruction& one, float* scores, int64_t head, int64_t place, int64_t first, int64_t count) const {
    if (one.bias_kind == BUCKETS) {
        const float* table = model_.vectors[(size_t)one.weight].data();
        for (int64_t k = 0; k < count; ++k) scores[k] += table[bucket_of(one, first + k - place) * one.heads + head];
        return;
    }
    const float slope = one.slopes[(size_t)head];
    if (one.bias_kind == SLOPES) {
        for (int64_t k = 0; k < count; ++k) scores[k] -= one.eps * slope * (float)std::abs(first + k - place);
        return;
    }
    const float rounded = rounded_to_bfloat16(slope);
    for (int64_t k = 0; k < count; ++k)
        scores[k] += one.eps * rounded_to_bfloat16(rounded * rounded_to_bfloat16((float)(first + k)));
}

}  // namespace polyformer
